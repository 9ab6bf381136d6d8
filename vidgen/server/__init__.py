"""The service: the engine behind an HTTP API, with a queue of jobs that aren't lost."""
