"""Drafted decoding: plugin tasks through the whole path against a bare vLLM server that decodes token by token.

Both serve the 0.5B model with the same engine arguments, drafts aside, and the bare server gets the very messages the
plugin sends. Besides the speed, the replies are compared: drafts must not change a greedy text more than other requests
in the batch do, which is what the last column shows of the bare server.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench import report
from tests.bench.decoding_tasks import KINDS, Kind, asks
from tests.bench.load import Target, measure_texts
from tests.bench.real_model import as_the_plugin_sends, beside_bare, fetch
from tests.product import KEY

MODEL = "qwen2.5-coder-0.5b"
CONTEXT = 4096
STREAMS = (1, 4, 16)
REQUESTS = {1: 2, 4: 4, 16: 16}
ROUNDS = 2

Prompts = Sequence[Sequence[dict[str, str]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means of the rounds, tokens per second each, and the share of replies that were the same.

    `texts` are the bare server's.
    """

    kind: Kind
    streams: int
    ours: float
    bare: float
    same: float
    texts: Sequence[str]

    @property
    def ratio(self) -> float:
        """Ours over bare."""
        return self.ours / self.bare


async def main() -> None:
    """Run it and write the section `decoding`."""
    with beside_bare(MODEL, await fetch(MODEL), CONTEXT) as (ours, bare):
        outcomes = [await _compare(ours, bare, kind, streams) for kind in KINDS for streams in STREAMS]
    load = report.load_average()
    note = f"{MODEL}, greedy, means of {ROUNDS} interleaved rounds, tokens per second, load average after: {load}."
    report.write_section("decoding", "Drafted decoding against bare vLLM", f"{note}\n\n{_table(outcomes)}")


async def _compare(ours: str, bare: str, kind: Kind, streams: int) -> Outcome:
    asked = asks(kind, REQUESTS[streams])
    targets = (Target("onebox", ours, kind.task, KEY), Target("bare", bare, "bare"))
    prompts: dict[str, Prompts] = {
        "onebox": [[{"role": "user", "content": text}] for text in asked],
        "bare": [await as_the_plugin_sends(kind.task, text) for text in asked],
    }
    speeds: dict[str, list[float]] = {target.name: [] for target in targets}
    replies: dict[str, list[str]] = {}
    for target in targets:  # both have every prompt in their prefix cache from here on
        _, replies[target.name] = await measure_texts(target, prompts[target.name], streams, kind.tokens)
    for turn in range(ROUNDS):
        for target in targets if turn % 2 == 0 else reversed(targets):
            sample, _ = await measure_texts(target, prompts[target.name], streams, kind.tokens)
            speeds[target.name].append(sample.tokens_per_s)
    return Outcome(
        kind,
        streams,
        statistics.fmean(speeds["onebox"]),
        statistics.fmean(speeds["bare"]),
        _same(replies["onebox"], replies["bare"]),
        replies["bare"],
    )


def _same(some: Sequence[str], others: Sequence[str]) -> float:
    """The share of equal texts, as far as both have one."""
    return statistics.fmean(one.strip() == other.strip() for one, other in zip(some, others, strict=False))


def _table(outcomes: Sequence[Outcome]) -> str:
    alone = {outcome.kind: outcome.texts for outcome in outcomes if outcome.streams == 1}
    rows = [
        (
            o.kind.name,
            str(o.streams),
            f"{o.ours:.1f}",
            f"{o.bare:.1f}",
            f"**{o.ratio:.2f}**",
            f"{o.same:.0%}",
            f"{_same(o.texts, alone[o.kind]):.0%}",
        )
        for o in outcomes
    ]
    for streams in STREAMS:
        ratio = statistics.geometric_mean(o.ratio for o in outcomes if o.streams == streams and o.kind.grounded)
        rows.append(("all on a given text, geometric mean", str(streams), "", "", f"**{ratio:.2f}**", "", ""))
    return report.table(("work", "streams", "onebox", "bare", "ratio", "same text", "bare's own, as alone"), rows)
