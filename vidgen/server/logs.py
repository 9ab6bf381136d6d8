"""Logs as JSON lines: time, level, text, and the job that they are about."""

from __future__ import annotations

import json
import logging
import sys
import time

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName",
                                                     "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object a record; what was given as `extra` becomes a field."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as a line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(), "logger": record.name, "text": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items()
                 if name not in _OWN and value is not None}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def log_as_json(level: int = logging.INFO) -> None:
    """Send all logs of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers, root.level = [handler], level
    logging.getLogger("uvicorn.access").disabled = True  # the service writes its own, with ids
