"""Figure 4: how long a start takes and what idle processes hold, on the default model."""

import os

import httpx
import psutil

from deploy import instance
from tests.bench import report
from tests.bench.load import Target, measure
from tests.bench.real_model import fresh_home
from tests.product import KEY, product

ROUNDS = 3
MODEL = os.environ.get("BENCH_MODEL", "qwen2.5-coder-0.5b")


async def main() -> None:
    """Run it and write the section `start`."""
    pages: list[float] = []
    tokens: list[float] = []
    memory: dict[str, float] = {}
    for _ in range(ROUNDS):
        with fresh_home() as home, product(home, {"ONEBOX_MODEL": MODEL}) as ours:
            prompt = [[{"role": "user", "content": "你好"}]]
            first = await measure(Target("onebox", ours.api_url, "auto", KEY), prompt, 1, 8)
            pages.append(ours.page_s)
            tokens.append(ours.ready_s + first.first_s)
            httpx.get(ours.ui_url).raise_for_status()
            running = instance.read(home)
            assert running is not None
            for name, pid in running.children.items():
                memory[name] = max(memory.get(name, 0), psutil.Process(pid).memory_info().rss / 1e6)
    pages.sort()
    tokens.sort()
    middle = ROUNDS // 2
    rows = [
        ("page answers", f"{pages[middle]:.1f} s", f"{pages[-1]:.1f} s"),
        ("first token of a reply", f"{tokens[middle]:.1f} s", f"{tokens[-1]:.1f} s"),
    ]
    text = report.table((f"after `make up` ({MODEL}, model already fetched)", "median", "worst"), rows)
    held = report.table(("process, idle", "resident"), [(name, f"{size:.0f} MB") for name, size in memory.items()])
    report.write_section("start", "Start and memory", f"{ROUNDS} starts.\n\n{text}\n\n{held}")
