"""Trains the reader on labelled messages. torch is needed here and nowhere at run time.

The same data gives the same weights on the same kind of processor.
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from agents.labelled import Labelled
from agents.reader.encoding import encode
from agents.reader.net import Net, pad
from agents.reader.pieces import Pieces
from agents.reader.plans import POOLS, STOP, UNSUPPORTED, numbers
from agents.reader.source import WIDTH, Source

ROUNDS: Final = 4
BATCH: Final = 32
RATE: Final = 1e-4
HEAD_RATE: Final = 5e-4
WARM_UP: Final = 50
SMOOTHING: Final = 0.05
PLAN_WEIGHT: Final = 1.0
UNSUPPORTED_WEIGHT: Final = 0.5
READ: Final = 40  # pieces of a message in training: a quarter quicker, and more are understood when they come
REPEATED: Final = 2  # times a request for several steps is seen in a round
FIRST_STEPS: Final = 12
PROBED: Final = 2000
PROBE_STEPS: Final = 400
PROBE_BATCH: Final = 256
PROBE_RATE: Final = 3e-3


@dataclass(slots=True)
class Example:
    """A message in pieces, its plan in numbers, and whether it asks for what cannot be done (None: not known).

    `states` is what the lower layers make of it, a row for each piece, once that has been worked out.
    """

    ids: torch.Tensor
    plan: tuple[int, ...]
    unsupported: bool | None
    states: torch.Tensor | None = None


def examples(pieces: Pieces, items: Sequence[Labelled]) -> list[Example]:
    """Labelled messages as training takes them."""
    return [
        Example(torch.from_numpy(encode(pieces, item.messages, READ).ids), tuple(numbers(item.plan)), item.unsupported)
        for item in items
    ]


def fresh(source: Source, device: str = "cpu") -> Net:
    """A net that has learned nothing; always the same. Sets torch's seed, threads and determinism for the process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what determinism asks for
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.set_num_threads(2)
    return Net(source, device)


def train(
    net: Net,
    known: Sequence[Example],
    *,
    steps: int | None = None,
    after: Callable[[Net, int], None] | None = None,
) -> list[float]:
    """Take `net` `ROUNDS` times through what is known; the losses of its first steps.

    `steps` ends it early, `after` is called after each round.
    """
    torch.manual_seed(0)
    random.seed(0)
    heads = {id(parameter) for parameter in net.heads()}
    body = [parameter for parameter in net.parameters() if id(parameter) not in heads]
    rates = (RATE, HEAD_RATE)
    optimizer = torch.optim.AdamW([{"params": body}, {"params": net.heads()}], weight_decay=0.01)
    seen = [one for one in known for _ in range(REPEATED if one.plan[1] != STOP else 1)]
    _probe(net.eval(), known)
    net.train()
    total, step = ROUNDS * math.ceil(len(seen) / BATCH), 0
    losses: list[float] = []
    for turn in range(ROUNDS):
        for some in _batches(seen):
            if step == steps:
                net.eval()
                return losses
            factor = min(1.0, (step + 1) / WARM_UP) * (1 - step / total)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = _loss(net, net(*_states(net, some)), some)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            step += 1
            if len(losses) < FIRST_STEPS:
                losses.append(round(loss.item(), 4))
        if after is not None:
            after(net.eval(), turn)
            net.train()
    net.eval()
    return losses


def scores(net: Net, known: Sequence[Example]) -> NDArray[np.float32]:
    """The net's scores of each message."""
    found = np.zeros((len(known), UNSUPPORTED + 1), dtype=np.float32)
    with torch.no_grad():
        for some in _alike(known):
            found[some] = net(*_states(net, [known[index] for index in some])).cpu().numpy()
    return found


def _probe(net: Net, known: Sequence[Example]) -> None:
    """Learn the answers alone on what the pretrained layers make of some messages: a start from which the layers learn
    what is missing and not what is known (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features").
    """
    some = random.sample(list(known), min(PROBED, len(known)))
    means = torch.empty(len(some), POOLS, WIDTH, device=net.device)
    with torch.no_grad():
        for places in _alike(some):
            means[places] = net.pooled(*_states(net, [some[place] for place in places]))
    net.middle.copy_(means[:, 0].mean(0))
    net.spread.copy_(means[:, 0].std(0))
    means = (means - net.middle) / net.spread
    optimizer = torch.optim.Adam(net.heads(), lr=PROBE_RATE)
    for _ in range(PROBE_STEPS):
        chosen = random.sample(range(len(some)), min(PROBE_BATCH, len(some)))
        loss = _loss(net, net.answer(means[chosen]), [some[place] for place in chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _loss(net: Net, found: torch.Tensor, some: Sequence[Example]) -> torch.Tensor:
    plans = torch.tensor([one.plan for one in some]).to(net.device)
    first, second, third = net.slots(found, plans)
    loss = F.cross_entropy(first, plans[:, 0], label_smoothing=SMOOTHING)
    loss = loss + PLAN_WEIGHT * F.cross_entropy(second, plans[:, 1])
    going = plans[:, 1] != STOP
    if going.any():
        loss = loss + PLAN_WEIGHT * F.cross_entropy(third[going], plans[going, 2], reduction="sum") / len(some) * 3
    said = torch.tensor([one.unsupported is not None for one in some])
    if said.any():
        said = said.to(net.device)
        truth = torch.tensor([float(bool(one.unsupported)) for one in some]).to(net.device)
        judged = F.binary_cross_entropy_with_logits(found[said, UNSUPPORTED], truth[said])
        loss = loss + UNSUPPORTED_WEIGHT * judged
    return loss


def _states(net: Net, some: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    if missing := [one for one in some if one.states is None]:
        found = net.lower(*pad([one.ids for one in missing])).half()
        for one, row in zip(missing, found, strict=True):
            one.states = row[: len(one.ids)].clone()
    states, real = pad([one.states for one in some if one.states is not None], 0)
    return states.float(), real


def _alike(known: Sequence[Example]) -> Iterator[list[int]]:
    """The examples' places, in batches of like length."""
    order = sorted(range(len(known)), key=lambda index: len(known[index].ids))
    for start in range(0, len(order), 2 * BATCH):
        yield order[start : start + 2 * BATCH]


def _batches(seen: Sequence[Example]) -> Iterator[list[Example]]:
    """Batches in random order, each of texts of like length."""
    order = random.sample(list(seen), len(seen))
    batches: list[list[Example]] = []
    for start in range(0, len(order), 20 * BATCH):
        near = sorted(order[start : start + 20 * BATCH], key=lambda example: len(example.ids))
        batches += [near[at : at + BATCH] for at in range(0, len(near), BATCH)]
    random.shuffle(batches)
    yield from batches
