"""Log lines: JSON, one a line, so that nothing a client sends can look like another line."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from squall.errors import InvalidRequest

MOST_BODY = 2**20  # bytes of a request or response that the log file keeps


class Log:
    """The access log on stderr, and the file of requests and responses if there is one."""

    def __init__(self, path: Path | None) -> None:
        self._stream: TextIO = sys.stderr
        self._file = None if path is None else _open(path)

    @property
    def keeps_bodies(self) -> bool:
        return self._file is not None

    def access(self, **fields: object) -> None:
        _write(self._stream, fields)

    def body(self, kind: str, request_id: str, data: bytes | bytearray) -> None:
        if self._file is not None:
            text = bytes(data[:MOST_BODY]).decode("utf-8", "replace")
            fields: dict[str, object] = {"id": request_id, kind: text}
            if len(data) > MOST_BODY:
                fields["cut_bytes"] = len(data) - MOST_BODY
            _write(self._file, fields)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _open(path: Path) -> TextIO:
    """A file to append to that only its owner may read: it has what people asked."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise InvalidRequest(f"cannot write the log {path}: {error.strerror}") from None
    return os.fdopen(number, "a", encoding="utf-8")


def _write(stream: TextIO, fields: dict[str, object]) -> None:
    stream.write(json.dumps({"time": _time(time.time()), **fields}) + "\n")
    stream.flush()


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, timezone.utc).isoformat(timespec="milliseconds")


class JsonFormatter(logging.Formatter):
    """Records of other code, tracebacks included, as lines of the same form."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)
