"""A fine-tuned transformer against the router's linear head, on the same training messages.

It is multilingual-e5-small with all twelve layers, and with four: what a reader of messages could do in the head's
place. Training takes minutes per epoch on two cores, so it is run by name only.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from agents.encoder import Encoder
from agents.route import expected_calibration_error
from agents.router_features import TASKS
from agents.router_head import Head, softmax
from agents.train_router import DATA, TRAINING, Labelled, predict, prepare, read_labelled
from onebox.messages import Message
from tests.bench import e5, report

LAYERS = (12, 4)
EPOCHS, BATCH, RANK = 3, 32, 16
RATE, HEAD_RATE, WARM_UP = 1.5e-3, 2e-3, 60
HEAD, TAIL, EARLIER = 40, 28, 16  # tokens of the message's beginning and end, and of the one before
LONG, LONG_HEAD, LONG_TAIL = 900, 500, 400  # characters
SURE = 0.8
SETS = ("golden.jsonl", "held_out.jsonl")
PLANS = "golden_plans.jsonl"
COUNT = len(TASKS)


@dataclass(frozen=True, slots=True)
class Example:
    """A message as tokens, and the steps that it asks for."""

    ids: list[int]
    plan: tuple[str, ...]


async def main() -> None:
    """Run it and write the section `reader`."""
    source = e5.Source(e5.data_file())
    rows = [("linear head", *_judged(_linear(name) for name in SETS), "")]
    for layers in LAYERS:
        net = _train(source, layers)
        scores = [
            _scores(net, [_encode(source, item.messages) for item in read_labelled([DATA / name])]) for name in SETS
        ]
        judged = _judged(np.stack([softmax(row[:COUNT]) for row in some]) for some in scores)
        rows.append((f"reader, {layers} layers", *judged, _plans(net, source)))
    header = (
        "",
        *(f"{name.removesuffix('.jsonl')}, {what}" for name in SETS for what in ("all", "hard", "surest 80 %", "ECE")),
        "plans",
    )
    note = (
        f"Trained on {len(_training(source))} messages, {EPOCHS} epochs; shares right; plans: exact of those of "
        "several steps, single of the decoys."
    )
    report.write_section("reader", "Who reads the message", f"{note}\n\n{report.table(header, rows)}")


def _train(source: e5.Source, layers: int) -> e5.Reader:
    torch.manual_seed(0)
    random.seed(0)
    examples = _training(source)
    net = e5.Reader(source, layers, RANK, 3 * COUNT)
    heads = [*net.answers.parameters(), *net.weigh.parameters()]
    known = {id(parameter) for parameter in heads}
    body = [parameter for parameter in net.parameters() if id(parameter) not in known]
    groups = [{"params": body, "lr": RATE}, {"params": heads, "lr": HEAD_RATE}]
    rates, optimizer = (RATE, HEAD_RATE), torch.optim.AdamW(groups, weight_decay=0.01)
    steps, step = EPOCHS * math.ceil(len(examples) / BATCH), 0
    net.train()
    for _ in range(EPOCHS):
        for some in _shuffled(examples):
            factor = min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            with torch.autocast("cpu", torch.bfloat16):
                scores = net(e5.batch_of([example.ids for example in some]))
            loss = _loss(scores.float(), [example.plan for example in some])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            step += 1
    return net.eval()


def _loss(scores: torch.Tensor, plans: Sequence[tuple[str, ...]]) -> torch.Tensor:
    """Of the first step's task, of which tasks are steps, and of the order of these."""
    first = torch.tensor([TASKS.index(plan[0]) for plan in plans])
    present = torch.zeros(len(plans), COUNT)
    early, late, rows = [], [], []
    for row, plan in enumerate(plans):
        places = [TASKS.index(task) for task in plan]
        present[row, places] = 1.0
        for index, place in enumerate(places):
            for after in places[index + 1 :]:
                rows.append(row)
                early.append(2 * COUNT + place)
                late.append(2 * COUNT + after)
    loss = F.cross_entropy(scores[:, :COUNT], first, label_smoothing=0.05)
    loss = loss + F.binary_cross_entropy_with_logits(scores[:, COUNT : 2 * COUNT], present)
    if rows:
        loss = loss + 0.5 * F.softplus(scores[rows, early] - scores[rows, late]).mean()
    return loss


def _training(source: e5.Source) -> list[Example]:
    """The router's messages; a plan that comes back to a task cannot be said in scores and is left out."""
    found: list[Example] = []
    for name in TRAINING:
        for record in map(json.loads, (DATA / name).read_text(encoding="utf-8").splitlines()):
            plan = tuple(record.get("plan") or [record["task"]])
            messages = tuple(Message(one["role"], one["content"]) for one in record["messages"])
            if len(set(plan)) == len(plan):
                found.append(Example(_encode(source, messages), plan))
    return found


def _encode(source: e5.Source, messages: Sequence[Message]) -> list[int]:
    text = messages[-1].text
    if len(text) > LONG:
        head, tail = source.split(text[:LONG_HEAD])[:HEAD], source.split(text[-LONG_TAIL:])[-TAIL:]
    else:
        whole = source.split(text)
        head, tail = (whole, []) if len(whole) <= HEAD + TAIL else (whole[:HEAD], whole[-TAIL:])
    ids = [e5.START, *head, e5.END, *tail, *([e5.END] if tail else [])]
    before = next((message.text for message in reversed(messages[:-1]) if message.role == "user"), None)
    if before is not None:
        earlier = source.split(before[:200])
        ids += [e5.END, *earlier[: EARLIER - 8], *earlier[EARLIER - 8 :][-8:], e5.END]
    return ids


def _shuffled(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Batches in random order, each of texts of like length."""
    order = random.sample(list(examples), len(examples))
    batches: list[list[Example]] = []
    for start in range(0, len(order), 20 * BATCH):
        near = sorted(order[start : start + 20 * BATCH], key=lambda example: len(example.ids))
        batches += [near[at : at + BATCH] for at in range(0, len(near), BATCH)]
    random.shuffle(batches)
    yield from batches


def _scores(net: e5.Reader, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    scores = np.zeros((len(texts), 3 * COUNT), dtype=np.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(order), 2 * BATCH):
            some = order[start : start + 2 * BATCH]
            scores[some] = net(e5.batch_of([texts[index] for index in some])).float().numpy()
    return scores


def _linear(name: str) -> NDArray[np.float32]:
    head, items = Head.load(), prepare(read_labelled([DATA / name]), Encoder())
    return np.stack([softmax(row / head.temperature) for row in predict(head, items)])


def _judged(shares: Iterator[NDArray[np.float32]]) -> Iterator[str]:
    for name, some in zip(SETS, shares, strict=True):
        items: list[Labelled] = read_labelled([Path(DATA / name)])
        right = some.argmax(1) == np.array([TASKS.index(item.task) for item in items])
        surest = np.argsort(-some.max(1), kind="stable")[: round(SURE * len(items))]
        yield from (f"{part.mean():.1%}" for part in (right, right[[item.hard for item in items]], right[surest]))
        yield f"{expected_calibration_error(some.max(1).tolist(), right.tolist()):.3f}"


def _plans(net: e5.Reader, source: e5.Source) -> str:
    records = [json.loads(line) for line in (DATA / PLANS).read_text(encoding="utf-8").splitlines()]
    texts = [
        _encode(source, [Message(one["role"], one["content"]) for one in record["messages"]]) for record in records
    ]
    exact = single = several = 0
    for record, row in zip(records, _scores(net, texts), strict=True):
        steps = [index for index in range(COUNT) if row[COUNT + index] > 0]
        plan = [TASKS[index] for index in sorted(steps, key=lambda index: row[2 * COUNT + index])]
        if len(record["plan"]) > 1:
            several += 1
            exact += plan == record["plan"]
        else:
            single += len(plan) < 2
    return f"{exact} of {several}, {single} of {len(records) - several}"
