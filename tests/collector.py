"""An OTLP/HTTP collector that keeps the spans it is sent, for tests of tracing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True, slots=True)
class Span:
    """What arrived of a span; ids in hexadecimal, `parent` empty at the root."""

    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, str | int | float | bool]
    failed: bool


@dataclass
class Collector:
    """Its address, and all spans so far."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)

    def named(self, name: str) -> list[Span]:
        """Those of this name."""
        return [span for span in list(self.spans) if span.name == name]


@contextmanager
def run_collector() -> Iterator[Collector]:
    """A collector that listens."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    collector.spans += [_span(span) for span in scope.spans]
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _span(span: WireSpan) -> Span:
    values = {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in span.attributes}
    failed = span.status.code == Status.STATUS_CODE_ERROR
    return Span(span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), values, failed)
