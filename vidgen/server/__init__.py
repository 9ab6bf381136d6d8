"""The service: an HTTP API to the engine, with a queue of jobs that aren't lost."""
