"""How the agent's log looks: lines for people, or one JSON object a line for what collects them."""

import json
import logging
from datetime import UTC, datetime
from enum import StrEnum, unique

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@unique
class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class JsonFormatter(logging.Formatter):
    """`at`, `level`, `logger`, `message`, and `error` with a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def start_logging(level: str, how: LogFormat) -> None:
    """Log to stderr, from `level` on."""
    handler = logging.StreamHandler()
    if how is LogFormat.JSON:
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
