"""Which drafter, and how long drafts: ours and vLLM's n-gram drafter in the same bare vLLM server, against none.

Three servers at a time share the machine, the one without drafts among them, and their rounds are interleaved.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench import report
from tests.bench.decoding import CONTEXT, MODEL
from tests.bench.decoding_tasks import KINDS, Kind, asks
from tests.bench.load import Target, measure
from tests.bench.real_model import VLLM_ENV, as_the_plugin_sends, fetch
from tests.product import bare_vllm

STREAMS = (1, 4, 16)
ROUNDS = 2
TOKENS = 64
WORK = (KINDS[0], KINDS[4])
NONE = "none"
OURS = {"method": "custom_class", "model": "serving.vllm_core.CoreDrafter"}
DRAFTERS: dict[str, dict[str, object]] = {
    "ours, up to 4": OURS | {"num_speculative_tokens": 4},
    "ours, up to 8": OURS | {"num_speculative_tokens": 8},
    "ours, up to 16": OURS | {"num_speculative_tokens": 16},
    **{
        f"vLLM n-gram, {length} after {low} to {high}": {
            "method": "ngram",
            "num_speculative_tokens": length,
            "prompt_lookup_min": low,
            "prompt_lookup_max": high,
        }
        for length, low, high in ((2, 2, 5), (4, 2, 5), (8, 2, 5))
    },
}


async def main() -> None:
    """Run it and write the section `drafters`."""
    model = await fetch(MODEL)
    names = list(DRAFTERS)
    ratios: dict[str, list[str]] = {}
    for start in range(0, len(names), 2):
        with _servers(model, names[start : start + 2]) as targets:
            ratios |= await _compare(targets)
    header = ("drafter", *(f"{kind.name}, {streams}" for kind in WORK for streams in STREAMS))
    load = report.load_average()
    note = (
        f"{MODEL}, greedy, {TOKENS} tokens a reply at most, tokens per second against no drafts at this number of "
        f"streams, medians of {ROUNDS} rounds, load average after: {load}."
    )
    table = report.table(header, [(name, *row) for name, row in ratios.items()])
    report.write_section("drafters", "Drafters against none", f"{note}\n\n{table}")


@contextmanager
def _servers(model: Path, names: Sequence[str]) -> Iterator[list[Target]]:
    """A server without drafts and one for each of these drafters."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ob-")))
        targets: list[Target] = []
        for index, name in enumerate((NONE, *names)):
            config = DRAFTERS.get(name)
            more = () if config is None else ("--speculative-config", json.dumps(config))
            server = bare_vllm(model, CONTEXT, folder / f"{index}.log", VLLM_ENV, *more)
            targets.append(Target(name, stack.enter_context(server), "bare"))
        yield targets


async def _compare(targets: Sequence[Target]) -> dict[str, list[str]]:
    ratios: dict[str, list[str]] = {target.name: [] for target in targets if target.name != NONE}
    for kind in WORK:
        for streams in STREAMS:
            speeds = await _speeds(targets, kind, streams)
            for name, row in ratios.items():
                row.append(f"{speeds[name] / speeds[NONE]:.2f}")
    return ratios


async def _speeds(targets: Sequence[Target], kind: Kind, streams: int) -> dict[str, float]:
    prompts = [await as_the_plugin_sends(kind.task, text) for text in asks(kind, max(2, streams))]
    tokens = min(TOKENS, kind.tokens)
    speeds: dict[str, list[float]] = {target.name: [] for target in targets}
    for target in targets:
        await measure(target, prompts, streams, 1)
    for turn in range(ROUNDS):
        for target in targets if turn % 2 == 0 else reversed(targets):
            speeds[target.name].append((await measure(target, prompts, streams, tokens)).tokens_per_s)
    return {name: statistics.median(some) for name, some in speeds.items()}
