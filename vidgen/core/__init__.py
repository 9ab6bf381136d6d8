"""Plain data and protocols: shapes, requests, configs, errors, the runtime."""
