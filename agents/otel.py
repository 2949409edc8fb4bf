"""The tracer that records: OpenTelemetry's SDK, sending spans in batches over OTLP/HTTP from a thread of its own."""

import threading
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agents.tracing import SpanKind, Value
from onebox import __version__
from onebox.errors import OneboxError

EXPORT_TIMEOUT_S: Final = 3.0
CLOSE_TIMEOUT_S: Final = 3.0
QUEUE_MAX: Final = 4096

_KINDS: Final = {
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
    "internal": trace.SpanKind.INTERNAL,
}
_PROPAGATOR: Final = TraceContextTextMapPropagator()


class OtelSpan:
    """A span of OpenTelemetry's; implements `agents.tracing.Span`."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str | None:
        """The span's name on the wire."""
        return _traceparent(trace.set_span_in_context(self._span))

    def note(self, **attributes: Value) -> None:
        """Add attributes."""
        self._span.set_attributes({name.replace("__", "."): value for name, value in attributes.items()})

    def rename(self, name: str) -> None:
        """Change the name."""
        self._span.update_name(name)

    def fail(self, code: str) -> None:
        """Mark it as failed."""
        self._span.set_attribute("error.type", code)
        self._span.set_status(Status(StatusCode.ERROR))


class OtelTracer:
    """Records and exports; implements `agents.tracing.Tracer`."""

    def __init__(self, endpoint: str) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "onebox-gateway", "service.version": __version__}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=QUEUE_MAX))
        self._tracer = self._provider.get_tracer("onebox", __version__)

    @contextmanager
    def span(
        self, name: str, kind: SpanKind = "internal", *, parent: str | None = None, current: bool = True
    ) -> Iterator[OtelSpan]:
        """A span that ends with its context."""
        above = context.get_current()
        if parent is not None and not trace.get_current_span().get_span_context().is_valid:
            above = _PROPAGATOR.extract({"traceparent": parent})
        span = self._tracer.start_span(name, above, _KINDS[kind])
        made = OtelSpan(span)
        token = context.attach(trace.set_span_in_context(span, above)) if current else None
        try:
            yield made
        except (CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            made.fail(error.code if isinstance(error, OneboxError) else type(error).__name__)
            raise
        finally:
            if token is not None:
                context.detach(token)
            span.end()

    def traceparent(self) -> str | None:
        """The span at work in this task."""
        return _traceparent(context.get_current())

    def close(self) -> None:
        """Export what is left, as far as that goes in the time."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_TIMEOUT_S)


def _traceparent(of: context.Context) -> str | None:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, of)
    return carrier.get("traceparent")
