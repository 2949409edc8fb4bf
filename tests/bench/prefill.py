"""What prompts cost before the first token: prefix-cache hits of the plugins' prompts, several replies from one prompt,
and replies bound to a choice.

One replica, asked over the engine wire; hits are vLLM's own counters.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from onebox.plugin import Plugin
from onebox.sockets import free_port
from onebox.testing import ScriptedContext, collect
from plugins.registry import load_plugins
from tests.bench import report
from tests.bench.decoding import MODEL
from tests.bench.decoding_tasks import KINDS, asks
from tests.bench.measures import ms
from tests.bench.real_model import fetch
from tests.processes import ROOT, FleetSpec, models_home, wait_until_ready
from tests.serving.wire import Wire

TOKEN = "bench"
SAMPLES = 4
CHOICES = 20
ROUNDS = 5
OPTIONS = ["summarize", "translate", "qa", "reason", "write", "chat"]


async def main() -> None:
    """Run it and write the section `prefill`."""
    await fetch(MODEL)
    with _replica(models_home()) as wire:
        first_s = await _first_token(wire, "Which task is this?", structured={"choice": OPTIONS})
        choices = await _choices(wire, first_s)
        plugins = load_plugins(tuple(OPTIONS))
        prompts = [await _plugin_row(wire, name, plugins[name]) for name in OPTIONS]
        samples = await _samples(wire)
    load = report.load_average()
    text = "\n\n".join(
        (
            f"{MODEL}, load average after: {load}.",
            "The plugins' own examples, each asked once; how many tokens of their prompts were in the prefix cache:",
            report.table(("task", "requests", "prompt tokens", "of them cached"), prompts),
            f"{SAMPLES} replies to one prompt, asked for at the same time, against one reply:",
            report.table(("replies", "prompt tokens", "of them cached", "first token p50"), samples),
            f"A reply bound to one of {len(OPTIONS)} choices against a free one, medians of {CHOICES} interleaved:",
            report.table(("reply", "first token p50"), choices),
        )
    )
    report.write_section("prefill", "Before the first token", text)


@contextmanager
def _replica(home: Path) -> Iterator[Wire]:
    port = free_port()
    values = {"home": str(home), "engine": "vllm", "model": MODEL, "model_context": "4096", "engine_coalesce_ms": "0"}
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        log = Path(folder) / "replica.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.serving.serve_directly", str(port)],
                cwd=ROOT,
                env=FleetSpec(values).environment(port, TOKEN),
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", TOKEN, log)
            yield Wire(f"http://127.0.0.1:{port}", TOKEN, 4096, 0)
        finally:
            process.terminate()
            process.wait(60)


async def _choices(wire: Wire, first_s: float) -> list[tuple[str, ...]]:
    times: dict[str, list[float]] = {"free": [], "choice": []}
    for number in range(CHOICES):
        content = f"Which task is number {number}: summarize, translate, qa, reason, write or chat?"
        await _first_token(wire, content)
        for name in times if number % 2 else reversed(times):
            structured = {"choice": OPTIONS} if name == "choice" else None
            times[name].append(await _first_token(wire, content, structured=structured))
    rows = [(name, ms(statistics.median(some))) for name, some in times.items()]
    return [*rows, ("the replica's very first choice, prompt not cached", ms(first_s))]


async def _plugin_row(wire: Wire, name: str, plugin: Plugin) -> tuple[str, ...]:
    calls = 0
    before = await _prefix_tokens(wire)
    for example in plugin.examples:
        context = ScriptedContext(replies=["…"] * 9)
        await collect(plugin, example.text, ctx=context)
        for call in context.calls:
            messages = [{"role": message.role, "content": message.text} for message in call.messages]
            await wire.generate(messages=messages, sampling={"max_tokens": 1})
            calls += 1
    asked, hits = _difference(await _prefix_tokens(wire), before)
    return name, str(calls), f"{asked:.0f}", f"{hits / max(1, asked):.0%}"


async def _samples(wire: Wire) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    texts = iter(asks(KINDS[0], 2 * ROUNDS))
    for count in (1, SAMPLES):
        times: list[float] = []
        before = await _prefix_tokens(wire)
        for _ in range(ROUNDS):
            content = next(texts)
            asked = [_first_token(wire, content, sampling={"temperature": 1.0, "seed": n}) for n in range(count)]
            times += await asyncio.gather(*asked)
        tokens, hits = _difference(await _prefix_tokens(wire), before)
        rows.append((str(count), f"{tokens / ROUNDS:.0f}", f"{hits / tokens:.0%}", ms(statistics.median(times))))
    return rows


async def _first_token(wire: Wire, content: str, **fields: object) -> float:
    sampling: dict[str, object] = {"max_tokens": 1}
    sampling |= fields.pop("sampling", {})  # type: ignore[arg-type]  # a JSON object
    started = time.perf_counter()
    await wire.generate(content, sampling=sampling, **{k: v for k, v in fields.items() if v is not None})
    return time.perf_counter() - started


async def _prefix_tokens(wire: Wire) -> tuple[float, float]:
    """Prompt tokens looked up in the prefix cache so far, and found there."""
    async with wire.client() as client:
        metrics = (await client.get("/metrics")).text
    found = [
        re.search(rf"^vllm:prefix_cache_{name}_total\S* (\S+)$", metrics, re.MULTILINE) for name in ("queries", "hits")
    ]
    asked, hits = (float(match.group(1)) if match else 0.0 for match in found)
    return asked, hits


def _difference(now: Sequence[float], then: Sequence[float]) -> tuple[float, float]:
    return now[0] - then[0], now[1] - then[1]
