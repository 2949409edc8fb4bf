"""Traces of a request through HTTP, run, plugin and engine call, as everything in a gateway sees them; off by default.

Off, a span is one shared object that does nothing. What records and exports spans is `agents.otel`, imported only when
`otel_endpoint` is set. Spans carry names, counts and codes, never text of a user or a model.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal, Protocol

from onebox.errors import SetupError
from onebox.settings import Settings

SpanKind = Literal["server", "client", "internal"]
Value = str | int | float | bool


class Span(Protocol):
    """A piece of work that is under way."""

    @property
    def traceparent(self) -> str | None:
        """The span's name on the wire, W3C Trace Context; None where nothing is recorded."""
        ...

    def note(self, **attributes: Value) -> None:
        """Add attributes; `__` in a name stands for a dot."""
        ...

    def rename(self, name: str) -> None:
        """Give it the name that was not known at its begin."""
        ...

    def fail(self, code: str) -> None:
        """Mark it as failed."""
        ...


class Tracer(Protocol):
    """Begins spans."""

    def span(
        self, name: str, kind: SpanKind = "internal", *, parent: str | None = None, current: bool = True
    ) -> AbstractContextManager[Span]:
        """A span that ends with its context; an exception but cancellation fails it.

        It belongs to the span at work in this task, or to `parent`, a traceparent, where there is none. `current` spans
        are the parents of what begins meanwhile; one that is opened in an async generator that others may close is not.
        """
        ...

    def traceparent(self) -> str | None:
        """The span at work in this task."""
        ...

    def close(self) -> None:
        """Export what is left; takes seconds where the collector is away."""
        ...


class _NoSpan:
    @property
    def traceparent(self) -> str | None:
        return None

    def note(self, **attributes: Value) -> None:
        pass

    def rename(self, name: str) -> None:
        pass

    def fail(self, code: str) -> None:
        pass


class _NoTracer:
    def span(
        self, name: str, kind: SpanKind = "internal", *, parent: str | None = None, current: bool = True
    ) -> AbstractContextManager[Span]:
        return _NO_SPAN

    def traceparent(self) -> str | None:
        return None

    def close(self) -> None:
        pass


_NO_SPAN: Final[AbstractContextManager[Span]] = nullcontext(_NoSpan())
NO_TRACER: Final[Tracer] = _NoTracer()


def open_tracer(settings: Settings) -> Tracer:
    """The tracer that the settings ask for.

    Raises:
        SetupError: its packages are not installed.
    """
    if settings.otel_endpoint is None:
        return NO_TRACER
    try:
        from agents.otel import OtelTracer
    except ImportError:
        raise SetupError(
            "ONEBOX_OTEL_ENDPOINT is set, but OpenTelemetry is not installed: nothing can be traced. "
            "Install it with pip install 'onebox[tracing]', or unset the variable."
        ) from None
    return OtelTracer(settings.otel_endpoint)
