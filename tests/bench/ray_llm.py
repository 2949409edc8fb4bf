"""The whole path against `ray.serve.llm`, in its default mode and in its direct-streaming mode.

The peer runs in its own environment with the vLLM that this Ray release pins; model, engine arguments and messages are
the same. One peer at a time stands beside the product, and their rounds alternate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onebox.sockets import free_port
from tests.bench import report
from tests.bench.load import Target, interleave, medians
from tests.bench.measures import ms
from tests.bench.path import question
from tests.bench.peers import ray_llm_python
from tests.bench.real_model import THREADS, VLLM_ENV, as_the_plugin_sends, fetch, fresh_home
from tests.product import KEY, ROOT, process, product

MODEL = "smollm2-135m"
CONTEXT = 4096
STREAMS = {1: 5, 16: 32}
ROUNDS = 5
TOKENS = 64
START_TIMEOUT_S = 400.0


async def main() -> None:
    """Run it and write the section `ray-llm`."""
    folder = await fetch(MODEL)
    rows: list[tuple[str, ...]] = []
    with fresh_home() as home:
        env = {"ONEBOX_MODEL": MODEL, "ONEBOX_MODEL_CONTEXT": str(CONTEXT), "ONEBOX_CPU_THREADS": THREADS}
        with product(home, env) as ours:
            onebox = Target("onebox", ours.api_url, "auto", KEY)
            for mode in ("default", "direct streaming"):
                with _peer(folder, mode, home / f"{mode.split()[0]}.log") as url:
                    peer = Target("peer", url, "peer")
                    rows += [await _row(mode, (onebox, peer), streams, asked) for streams, asked in STREAMS.items()]
    text = report.table(
        ("mode", "streams", "onebox tok/s", "peer tok/s", "ratio", "onebox first token", "peer first token", "ratio"),
        rows,
    )
    load = report.load_average()
    note = (
        f"{MODEL}, {TOKENS} tokens a reply, greedy, medians of {ROUNDS} interleaved rounds; ray 2.60.0 with the vLLM "
        f"that it pins (0.29.0, CPU); load average after: {load}."
    )
    report.write_section("ray-llm", "Whole path against ray.serve.llm", f"{note}\n\n{text}")


@contextmanager
def _peer(model: Path, mode: str, log: Path) -> Iterator[str]:
    port = free_port()
    env = VLLM_ENV | {
        "PYTHONPATH": "",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # as the product's own replicas
    }
    if mode != "default":
        names = ("STATS_PORT", "METRICS_PORT")
        env |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}
        env |= {f"RAY_SERVE_HAPROXY_{name}": str(free_port()) for name in names}
    argv = (str(ray_llm_python()), str(ROOT / "tests/bench/ray_llm_server.py"), str(model), str(port), str(CONTEXT))
    with process(argv, f"http://127.0.0.1:{port}/v1/models", log, env, START_TIMEOUT_S):
        yield f"http://127.0.0.1:{port}"


async def _row(mode: str, targets: tuple[Target, Target], streams: int, asked: int) -> tuple[str, ...]:
    texts = [question(index) for index in range(asked)]
    prompts = {
        targets[0].name: [[{"role": "user", "content": text}] for text in texts],
        targets[1].name: [await as_the_plugin_sends("write", text) for text in texts],
    }
    await interleave(targets, {name: some[:3] for name, some in prompts.items()}, streams, TOKENS, 1)
    samples = await interleave(targets, prompts, streams, TOKENS, ROUNDS)
    ours, peer = (medians(samples[target.name]) for target in targets)
    return (
        mode,
        str(streams),
        f"{ours.tokens_per_s:.0f}",
        f"{peer.tokens_per_s:.0f}",
        f"**{ours.tokens_per_s / peer.tokens_per_s:.2f}x**",
        ms(ours.first_s),
        ms(peer.first_s),
        f"**{ours.first_s / peer.first_s:.2f}x**",
    )
