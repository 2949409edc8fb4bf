"""Figures 1 and 2: the whole path (HTTP, gateway, router, plugin, store, Serve, vLLM) against a bare vLLM server.

Both run the same model with the same engine arguments at the same time; the bare server gets the very messages
the plugin sends, so both prefill and decode the same tokens.
"""

import asyncio
import os
import tempfile
from pathlib import Path

from onebox.settings import read_settings
from onebox.testing import ScriptedContext, collect
from plugins.registry import load_plugins
from serving.fetch import ensure
from serving.models import resolve
from tests.bench import report
from tests.bench.load import Target, interleave, medians
from tests.product import KEY, bare_vllm, product

MODEL = "smollm2-135m"
CONTEXT = 4096
STREAMS = (1, 8, 16)
ROUNDS = 5
TOKENS = 64
REQUESTS = {1: 5, 8: 16, 16: 32}
PLACES = ("Paris", "Lagos", "Lima", "Oslo", "Cairo", "Quito", "Hanoi", "Perth")
TOPICS = ("the weather", "a long walk", "its old bridges", "street food", "a rainy evening")


async def main() -> None:
    """Run it and write the section `path`."""
    cache = Path(os.environ.get("ONEBOX_TEST_HOME", "~/.cache/onebox-test")).expanduser()
    settings = read_settings(home=cache, model=MODEL)
    await asyncio.to_thread(ensure, settings, _quiet)
    model = resolve(settings)
    threads = str(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        home = Path(folder)
        (home / "models").symlink_to(cache / "models")
        env = {"ONEBOX_MODEL": MODEL, "ONEBOX_MODEL_CONTEXT": str(CONTEXT), "ONEBOX_CPU_THREADS": threads}
        vllm_env = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
        }
        with (
            product(home, env) as ours,
            bare_vllm(Path(model.path), CONTEXT, home / "bare.log", vllm_env) as bare,
        ):
            targets = (
                Target("onebox", ours.api_url, "auto", KEY),
                Target("bare vLLM", bare, "bare"),
            )
            rows = [await _row(targets, streams) for streams in STREAMS]
    text = report.table(
        ("streams", "onebox tok/s", "bare tok/s", "ratio", "onebox first token", "bare first token", "added p50"), rows
    )
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    note = f"{MODEL}, {TOKENS} tokens a reply, greedy, medians of {ROUNDS} rounds, load average after: {load}."
    report.write_section("path", "Whole path against bare vLLM", f"{note}\n\n{text}")


async def _row(targets: tuple[Target, Target], streams: int) -> tuple[str, ...]:
    asked = [_question(index) for index in range(REQUESTS[streams])]
    prompts = {
        targets[0].name: [[{"role": "user", "content": text}] for text in asked],
        targets[1].name: [await _as_the_plugin_sends(text) for text in asked],
    }
    await interleave(targets, {name: some[:3] for name, some in prompts.items()}, streams, TOKENS, 1)
    samples = await interleave(targets, prompts, streams, TOKENS, ROUNDS)
    ours, bare = (medians(samples[target.name]) for target in targets)
    return (
        str(streams),
        f"{ours.tokens_per_s:.0f}",
        f"{bare.tokens_per_s:.0f}",
        f"**{ours.tokens_per_s / bare.tokens_per_s:.3f}**",
        f"{ours.first_s * 1000:.1f} ms",
        f"{bare.first_s * 1000:.1f} ms",
        f"{(ours.first_s - bare.first_s) * 1000:+.1f} ms",
    )


def _question(index: int) -> str:
    place, topic = PLACES[index % len(PLACES)], TOPICS[index % len(TOPICS)]
    return f"Write a long story about {topic} in {place}, part {index + 1}."


async def _as_the_plugin_sends(text: str) -> list[dict[str, str]]:
    context = ScriptedContext(replies=["…"])
    await collect(load_plugins(("write",))["write"], text, ctx=context)
    return [{"role": message.role, "content": message.text} for message in context.calls[0].messages]


def _quiet(stage: str, done: int, total: int | None) -> None:
    del stage, done, total
