"""Logs of every process: one line per record, as text or JSON, with the run that it is about.

What a line says about its run comes from the context, so that a library's lines have it too. Lines never quote what
a user or a model wrote: an exception is its type and its frames; only level `debug` adds its message, which may quote.
"""

import hashlib
import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from onebox.settings import Settings

Part = Literal["launcher", "gateway", "page", "fleet", "replica"]

_ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

FILE_BYTES: Final = 10 * 1024 * 1024
FILES_KEPT: Final = 2

_context: ContextVar[Mapping[str, str]] = ContextVar("onebox_log_context", default={})  # noqa: B039  # never mutated


def set_up(settings: Settings, part: Part, worker: int | None = None, file: Path | None = None) -> None:
    """Send this process's log to stderr, or to `file`, kept small, if it can be. Lines name `part` and `worker`."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if file is not None:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            handler = RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8")
    origin = {"part": part} | ({"worker": str(worker)} if worker is not None else {})
    messages = settings.log_level == "debug"
    handler.setFormatter(JsonLines(origin, messages) if settings.log_format == "json" else TextLines(origin, messages))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(max(logging.WARNING, logging.getLogger().level))  # a line per request


def adopt(logger: str) -> None:
    """Let a library's logger write as everything here does, not as it has set itself up."""
    other = logging.getLogger(logger)
    other.handlers.clear()
    other.propagate = True


def bind(*, run: str | None = None, request: str | None = None, tenant: str | None = None) -> None:
    """Say what the lines of this task, and of the tasks that it starts, are about. The tenant is hashed."""
    given = {"run": run, "request": request, "tenant": None if tenant is None else hashed(tenant)}
    _context.set({**_context.get(), **{name: value for name, value in given.items() if value is not None}})


def hashed(tenant: str) -> str:
    """What logs and traces call a tenant: the same for the same one, and no name."""
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:12]


class TextLines(logging.Formatter):
    """For people: time, level, logger, message, then what the line is about in brackets."""

    def __init__(self, origin: Mapping[str, str], messages: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._worker = {"worker": origin["worker"]} if "worker" in origin else {}
        self._messages = messages

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, before its exception."""
        about = _context.get()
        line = super().formatMessage(record)
        if not about:
            return line
        return f"{line} [{' '.join(f'{name}={value}' for name, value in {**about, **self._worker}.items())}]"

    def formatException(self, ei: _ExceptionInfo) -> str:
        """The exception's frames and types, below the line."""
        return exception_text(ei[1], self._messages)


class JsonLines(logging.Formatter):
    """For machines: one JSON object per line, with `time` in UTC, `level`, `logger`, `message`, `error`."""

    def __init__(self, origin: Mapping[str, str], messages: bool) -> None:
        super().__init__()
        self._origin = dict(origin)
        self._messages = messages

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._origin,
            **_context.get(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = exception_text(record.exc_info[1], self._messages)
        return json.dumps(line, ensure_ascii=False)


def exception_text(error: BaseException | None, messages: bool) -> str:
    """The frames and types of an exception and of those it came from, oldest first; `messages` adds what they say."""
    lines: list[str] = []
    for each in reversed(list(_chain(error))):
        lines += traceback.format_tb(each.__traceback__)
        name = f"{type(each).__module__}.{type(each).__qualname__}".removeprefix("builtins.")
        lines.append(f"{name}: {each}\n" if messages else f"{name}\n")
    return "".join(lines).rstrip("\n")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, its parts if it is a group, then what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            for part in error.exceptions:
                yield from _chain(part)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
