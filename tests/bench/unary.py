"""Figure 4: short replies without a stream, as classification asks for them, against LiteLLM's proxy.

Each client sends its next request once it has the last reply. Our path is the whole one: key, queue, plugin, durable
log (two synced writes a request), Serve, engine. The engine answers at once, so the paths themselves are measured.
"""

import asyncio
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import orjson

from tests.bench import report
from tests.bench.measures import ms, percentile
from tests.bench.peers import LITELLM_KEY, litellm_proxy, paced_server
from tests.product import KEY, product

CLIENTS = 16
ROUNDS = 5
ROUND_S = 4.0
TOKENS = 4
TEXT = "Answer yes or no: is this message urgent? The pump in cellar two has stopped and the water rises."


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a request goes and what it says."""

    name: str
    url: str
    key: str
    body: dict[str, object]

    def request(self) -> bytes:
        """The request as it goes over the wire."""
        address, body = urlsplit(self.url), orjson.dumps(self.body)
        head = (
            f"POST {address.path} HTTP/1.1\r\nhost: {address.netloc}\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True, slots=True)
class Round:
    """Requests a second, and the seconds of each."""

    rate: float
    seconds: list[float]


async def main() -> None:
    """Run it and write the section `unary`."""
    with tempfile.TemporaryDirectory(prefix="ob-") as folder, ExitStack() as stack:
        home = Path(folder)
        litellm = stack.enter_context(litellm_proxy(stack.enter_context(paced_server(0, 0, home)), home))
        env = {"ONEBOX_ENGINE": "scripted", "ONEBOX_SCRIPTED_TTFT_MS": "0", "ONEBOX_SCRIPTED_ITL_MS": "0"}
        ours = stack.enter_context(product(home / "home", env))
        chat = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": TOKENS}
        endpoints = (
            Endpoint("onebox", f"{ours.api_url}/v1/tasks/chat", KEY, {"text": TEXT, "max_tokens": TOKENS}),
            Endpoint("LiteLLM, 1 worker", f"{litellm}/v1/chat/completions", LITELLM_KEY, chat | {"model": "paced"}),
        )
        rounds: dict[str, list[Round]] = {endpoint.name: [] for endpoint in endpoints}
        for endpoint in endpoints:
            await _round(endpoint, 2.0)
        for turn in range(ROUNDS):
            for endpoint in endpoints if turn % 2 == 0 else reversed(endpoints):
                rounds[endpoint.name].append(await _round(endpoint, ROUND_S))
    rates = {name: statistics.median(one.rate for one in some) for name, some in rounds.items()}
    rows = []
    for name, some in rounds.items():
        seconds = [second for one in some for second in one.seconds]
        latency = f"{ms(percentile(seconds, 0.5))} / {ms(percentile(seconds, 0.99))}"
        rows.append((name, f"{rates[name]:.0f}", latency, f"{rates['onebox'] / rates[name]:.1f}x"))
    text = report.table(("path", "requests/s", "p50 / p99", "onebox is"), rows)
    load = report.load_average()
    note = (
        f"{CLIENTS} clients, {TOKENS} tokens a reply, no pace, medians of {ROUNDS} rounds of {ROUND_S:g} s; goal 8x; "
        f"clients, engine and store run on the same {os.cpu_count()} cores; load average after: {load}."
    )
    report.write_section("unary", "Short replies at once", f"{note}\n\n{text}")


async def _round(endpoint: Endpoint, seconds: float) -> Round:
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(_client(endpoint, began + seconds)) for _ in range(CLIENTS)]
    took = [one for client in clients for one in client.result()]
    return Round(len(took) / (time.perf_counter() - began), took)


async def _client(endpoint: Endpoint, until: float) -> list[float]:
    """The seconds of each request. Raises `RuntimeError` on anything but a 200 with a reply in it."""
    address, request = urlsplit(endpoint.url), endpoint.request()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    took: list[float] = []
    try:
        while (began := time.perf_counter()) < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            body = await reader.readexactly(int(length.partition(b":")[2]))
            if b" 200 " not in head[:16] or b"usage" not in body:
                raise RuntimeError(f"{endpoint.name}: {head[:40]!r} {body[:300]!r}")
            took.append(time.perf_counter() - began)
    finally:
        writer.close()
    return took
