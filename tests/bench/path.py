"""Figures 1 and 2: the whole path (HTTP, gateway, router, plugin, store, Serve, vLLM) against a bare vLLM server.

Both run the same model with the same engine arguments at the same time; the bare server gets the very messages
the plugin sends, so both prefill and decode the same tokens.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.bench import report
from tests.bench.load import Target, interleave, medians
from tests.bench.real_model import as_the_plugin_sends, beside_bare, fetch
from tests.bench.short_model import shortened
from tests.product import KEY

MODEL = "smollm2-135m"
CONTEXT = 4096
STREAMS = (1, 8, 16, 32)
ROUNDS = 5
TOKENS = 64
REQUESTS = {1: 5, 8: 16, 16: 32, 32: 64}
LAYERS = 2  # of the model whose decoding costs next to nothing
PLACES = ("Paris", "Lagos", "Lima", "Oslo", "Cairo", "Quito", "Hanoi", "Perth")
TOPICS = ("the weather", "a long walk", "its old bridges", "street food", "a rainy evening")


async def main() -> None:
    """Run it and write the section `path`."""
    folder = await fetch(MODEL)
    rows: list[tuple[str, ...]] = []
    with beside_bare(MODEL, folder, CONTEXT) as (ours, bare):
        rows += [await _row(MODEL, _targets(ours, bare), streams) for streams in STREAMS]
    with tempfile.TemporaryDirectory(prefix="ob-") as place:
        short = shortened(folder, LAYERS, Path(place) / "short")
        with beside_bare(str(short), short, CONTEXT) as (ours, bare):
            rows.append(await _row(f"its first {LAYERS} layers", _targets(ours, bare), 16))
    text = report.table(
        (
            "model", "streams", "onebox tok/s", "bare tok/s", "ratio",
            "onebox first token", "bare first token", "added p50", "ratio",
        ),
        rows,
    )  # fmt: skip
    load = report.load_average()
    note = f"{TOKENS} tokens a reply, greedy, medians of {ROUNDS} interleaved rounds, load average after: {load}."
    report.write_section("path", "Whole path against bare vLLM", f"{note}\n\n{text}")


def _targets(ours: str, bare: str) -> tuple[Target, Target]:
    return Target("onebox", ours, "auto", KEY), Target("bare vLLM", bare, "bare")


async def _row(model: str, targets: tuple[Target, Target], streams: int) -> tuple[str, ...]:
    asked = [question(index) for index in range(REQUESTS[streams])]
    prompts: dict[str, Sequence[Sequence[dict[str, str]]]] = {
        targets[0].name: [[{"role": "user", "content": text}] for text in asked],
        targets[1].name: [await as_the_plugin_sends("write", text) for text in asked],
    }
    await interleave(targets, {name: some[:3] for name, some in prompts.items()}, streams, TOKENS, 1)
    samples = await interleave(targets, prompts, streams, TOKENS, ROUNDS)
    ours, bare = (medians(samples[target.name]) for target in targets)
    return (
        model,
        str(streams),
        f"{ours.tokens_per_s:.0f}",
        f"{bare.tokens_per_s:.0f}",
        f"**{ours.tokens_per_s / bare.tokens_per_s:.3f}**",
        f"{ours.first_s * 1000:.1f} ms",
        f"{bare.first_s * 1000:.1f} ms",
        f"{(ours.first_s - bare.first_s) * 1000:+.1f} ms",
        f"{ours.first_s / bare.first_s:.2f}",
    )


def question(index: int) -> str:
    """The message of a request."""
    place, topic = PLACES[index % len(PLACES)], TOPICS[index % len(TOPICS)]
    return f"Write a long story about {topic} in {place}, part {index + 1}."
