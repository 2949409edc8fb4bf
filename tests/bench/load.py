"""The load generator: the same light streaming client for the product and for every peer."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import orjson


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-shaped server. `extra` is merged into each request body."""

    name: str
    url: str
    model: str
    key: str = "none"
    extra: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """One streamed reply: seconds to the first text and to the end, completion tokens by the server's count."""

    first_s: float
    total_s: float
    tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One round at one concurrency: tokens per second over all streams, median first-token seconds."""

    tokens_per_s: float
    first_s: float


async def stream(
    http: aiohttp.ClientSession, target: Target, messages: Sequence[dict[str, str]], max_tokens: int
) -> Reply:
    """Send one chat request and read its stream to the end. Raises `RuntimeError` on anything but a whole reply."""
    body = {
        "model": target.model,
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": max_tokens,
        "temperature": 0,
        **dict(target.extra),
    }
    started = time.perf_counter()
    first_s, tokens, ended = 0.0, 0, False
    said: list[str] = []
    headers = {"Authorization": f"Bearer {target.key}"}
    async with http.post(f"{target.url}/v1/chat/completions", json=body, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{target.name}: {response.status} {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                ended = True
                break
            chunk = orjson.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"{target.name}: {chunk['error']}")
            if chunk["choices"] and (piece := chunk["choices"][0]["delta"].get("content")):
                first_s = first_s or time.perf_counter() - started
                said.append(piece)
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    if not ended or not tokens:
        raise RuntimeError(f"{target.name}: the stream ended early (tokens {tokens}, done {ended})")
    return Reply(first_s, time.perf_counter() - started, tokens, "".join(said))


async def measure(
    target: Target,
    prompts: Sequence[Sequence[dict[str, str]]],
    streams: int,
    max_tokens: int,
) -> Sample:
    """Send all `prompts`, `streams` of them at a time."""
    sample, _ = await measure_texts(target, prompts, streams, max_tokens)
    return sample


async def measure_texts(
    target: Target,
    prompts: Sequence[Sequence[dict[str, str]]],
    streams: int,
    max_tokens: int,
) -> tuple[Sample, list[str]]:
    """As `measure`, and the text of each reply in the prompts' order."""
    waiting = list(range(len(prompts)))
    replies: dict[int, Reply] = {}

    async def reader() -> None:
        while waiting:
            index = waiting.pop()
            replies[index] = await stream(http, target, prompts[index], max_tokens)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as http:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(reader())
        elapsed = time.perf_counter() - started
    sample = Sample(
        sum(reply.tokens for reply in replies.values()) / elapsed,
        statistics.median(reply.first_s for reply in replies.values()),
    )
    return sample, [replies[index].text for index in range(len(prompts))]


async def interleave(
    targets: Sequence[Target],
    prompts: dict[str, Sequence[Sequence[dict[str, str]]]],
    streams: int,
    max_tokens: int,
    rounds: int,
) -> dict[str, list[Sample]]:
    """`rounds` samples of each target, A B A B …, the order turned round each time. `prompts` by target name."""
    samples: dict[str, list[Sample]] = {target.name: [] for target in targets}
    for turn in range(rounds):
        for target in targets if turn % 2 == 0 else reversed(targets):
            samples[target.name].append(await measure(target, prompts[target.name], streams, max_tokens))
    return samples


def medians(samples: Sequence[Sample]) -> Sample:
    """The median of each figure."""
    return Sample(
        statistics.median(sample.tokens_per_s for sample in samples),
        statistics.median(sample.first_s for sample in samples),
    )
