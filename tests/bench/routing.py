"""Figure 3: the whole path on the scripted engine against proxies in front of an equally paced server.

LiteLLM's proxy (one worker) and vllm-router run in an environment of their own, made by `tests.bench.peers`.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from onebox.sockets import free_port
from tests.bench import report
from tests.bench.load import Target, interleave, medians
from tests.bench.peers import LITELLM_KEY, litellm_proxy, paced_server, peer_python
from tests.product import KEY, process, product

STREAMS = 64
ROUNDS = 5
TOKENS = 64
TTFT_MS, ITL_MS = 5, 5


async def main() -> None:
    """Run it and write the section `routing`."""
    peers = peer_python().parent
    with tempfile.TemporaryDirectory(prefix="ob-") as folder, ExitStack() as stack:
        home = Path(folder)
        router_port = free_port()
        paced = stack.enter_context(paced_server(TTFT_MS, ITL_MS, home))
        litellm = stack.enter_context(litellm_proxy(paced, home))
        router_argv = (
            str(peers / "python"), "-m", "vllm_router.launch_router", "--worker-urls", paced, "--policy", "round_robin",
            "--host", "127.0.0.1", "--port", str(router_port), "--prometheus-port", str(free_port()),
        )  # fmt: skip
        router = f"http://127.0.0.1:{router_port}"
        stack.enter_context(process(router_argv, f"{router}/health", home / "router.log"))
        env = {
            "ONEBOX_ENGINE": "scripted",
            "ONEBOX_SCRIPTED_TTFT_MS": str(TTFT_MS),
            "ONEBOX_SCRIPTED_ITL_MS": str(ITL_MS),
            "ONEBOX_ENGINE_MAX_ONGOING": "128",
        }
        ours = stack.enter_context(product(home / "home", env))
        targets = (
            Target("onebox", ours.api_url, "auto", KEY),
            Target("vllm-router", router, "paced"),
            Target("LiteLLM, 1 worker", litellm, "paced", LITELLM_KEY),
            Target("the paced server itself", paced, "paced"),
        )
        asked = [[{"role": "user", "content": f"Write a story, number {index}."}] for index in range(2 * STREAMS)]
        prompts = {target.name: asked for target in targets}
        await interleave(targets, {target.name: asked[:8] for target in targets}, 8, TOKENS, 1)
        samples = await interleave(targets, prompts, STREAMS, TOKENS, ROUNDS)
    median = {target.name: medians(samples[target.name]) for target in targets}
    best = median["onebox"].tokens_per_s
    rows = [
        (name, f"{sample.tokens_per_s:.0f}", f"{sample.first_s * 1000:.0f} ms", f"{best / sample.tokens_per_s:.2f}x")
        for name, sample in median.items()
    ]
    text = report.table(("path", "tok/s", "first token p50", "onebox is"), rows)
    load = report.load_average()
    note = (
        f"{STREAMS} streams, {ITL_MS} ms a token, {TOKENS} tokens a reply, medians of {ROUNDS} rounds, "
        f"load average after: {load}."
    )
    report.write_section("routing", "Routing layer against proxies", f"{note}\n\n{text}")
