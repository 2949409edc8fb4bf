"""What the log costs: the whole path with runs stored before they are sent, against the same path with the log off.

Two gateway workers of one product share its engine and its store: one logs, the other does not.
"""

import secrets
import sys
from pathlib import Path

from onebox.sockets import free_port
from tests.bench import report
from tests.bench.load import Sample, Target, interleave
from tests.bench.measures import ms
from tests.bench.real_model import THREADS, fetch, fresh_home
from tests.product import KEY, process, product

MODEL = "smollm2-135m"
ROUNDS = 5
TOKENS = 96
VLLM_STREAMS = {1: 6, 8: 16, 16: 32}


async def main() -> None:
    """Run it on vLLM and write the section `durability`."""
    await measure("durability", "vllm", VLLM_STREAMS)


async def measure(section: str, engine: str, streams: dict[int, int]) -> None:
    """Run it on one engine and write its section."""
    rows = await _rows(engine, streams)
    text = report.table(
        ("engine", "streams", "log on tok/s", "log off tok/s", "ratio", "log on first token", "added p50"), rows
    )
    load = report.load_average()
    note = (
        f"{MODEL if engine == 'vllm' else 'Scripted engine at 5 ms per token'}; {TOKENS} tokens a reply, medians of "
        f"{ROUNDS} rounds of interleaved pairs, ratios and differences within a round, load average after: {load}."
    )
    report.write_section(section, f"Cost of durability ({engine})", f"{note}\n\n{text}")


async def _rows(engine: str, streams: dict[int, int]) -> list[tuple[str, ...]]:
    await fetch(MODEL)
    with fresh_home() as home:
        port, engine_port, token = free_port(), free_port(), secrets.token_hex(8)
        env = {
            "ONEBOX_ENGINE": engine,
            "ONEBOX_MODEL": MODEL,
            "ONEBOX_MODEL_CONTEXT": "4096",
            "ONEBOX_CPU_THREADS": THREADS,
            "ONEBOX_GATEWAY_WORKERS": "1",
            "ONEBOX_INTERNAL_TOKEN": token,
            "ONEBOX_ENGINE_PORT": str(engine_port),
        }
        with product(home, env) as ours:
            url = _store_url(home)
            second = env | {
                "ONEBOX_HOME": str(home),
                "ONEBOX_ADMIN_KEY": KEY,
                "ONEBOX_API_PORT": str(port),
                "ONEBOX_ENGINE_URL": f"http://127.0.0.1:{engine_port}",
                "ONEBOX_REDIS_URL": url,
                "ONEBOX_LOG_ENABLED": "false",
            }
            off_url = f"http://127.0.0.1:{port}"
            with process((sys.executable, "-m", "agents"), f"{off_url}/readyz", home / "off.log", second):
                targets = (Target("on", ours.api_url, "chat", KEY), Target("off", off_url, "chat", KEY))
                return [await _row(engine, targets, count, asked) for count, asked in streams.items()]


def _store_url(home: Path) -> str:
    """Where the product's own store listens, from the configuration that it was started with."""
    lines = (home / "store" / "valkey.conf").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return f"redis://:{values['requirepass']}@127.0.0.1:{values['port']}/0"


async def _row(engine: str, targets: tuple[Target, Target], streams: int, asked: int) -> tuple[str, ...]:
    messages = [[{"role": "user", "content": f"Tell a long story, number {index}."}] for index in range(asked)]
    prompts = {target.name: messages for target in targets}
    await interleave(targets, {name: some[:4] for name, some in prompts.items()}, streams, TOKENS, 1)
    samples = await interleave(targets, prompts, streams, TOKENS, ROUNDS)
    pairs = list(zip(samples["on"], samples["off"], strict=True))
    on, off = _median(samples["on"]), _median(samples["off"])
    ratio = sorted(one.tokens_per_s / two.tokens_per_s for one, two in pairs)[len(pairs) // 2]
    added_s = sorted(one.first_s - two.first_s for one, two in pairs)[len(pairs) // 2]
    return (
        engine,
        str(streams),
        f"{on.tokens_per_s:.0f}",
        f"{off.tokens_per_s:.0f}",
        f"**{ratio:.3f}**",
        ms(on.first_s),
        f"{added_s * 1000:+.1f} ms",
    )


def _median(samples: list[Sample]) -> Sample:
    middle = len(samples) // 2
    return Sample(
        sorted(sample.tokens_per_s for sample in samples)[middle], sorted(sample.first_s for sample in samples)[middle]
    )
