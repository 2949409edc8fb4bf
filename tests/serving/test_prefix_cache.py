"""The scripted engine's prefix cache: what is there counts as a hit and takes no time."""

import time
from contextlib import aclosing

from onebox.settings import read_settings
from serving.prefix_cache import BLOCK_TOKENS, PrefixCache
from serving.protocol import End, GenerateRequest, WireMessage, WireSampling
from serving.scripted_engine import ScriptedEngine

WORDS = [f"w{number}" for number in range(20 * BLOCK_TOKENS)]


def test_prompt_that_was_seen_is_found_but_for_its_last_block() -> None:
    cache = PrefixCache(10_000)
    assert cache.look_up(WORDS, None) == 0
    cache.keep(WORDS, None)
    assert cache.look_up(WORDS, None) == len(WORDS) - BLOCK_TOKENS
    assert cache.look_up([*WORDS, "more"], None) == len(WORDS)
    assert (cache.queried, cache.hits) == (3 * len(WORDS) + 1, 2 * len(WORDS) - BLOCK_TOKENS)


def test_only_a_common_beginning_is_found() -> None:
    cache = PrefixCache(10_000)
    cache.keep(WORDS, None)
    middle = 5 * BLOCK_TOKENS + 3
    assert cache.look_up([*WORDS[:middle], "other", *WORDS[middle:]], None) == 5 * BLOCK_TOKENS
    assert cache.look_up(["other", *WORDS], None) == 0


def test_tenants_find_nothing_of_each_other() -> None:
    cache = PrefixCache(10_000)
    cache.keep(WORDS, "a")
    assert cache.look_up(WORDS, "b") == 0


def test_what_was_unused_longest_is_forgotten_first() -> None:
    cache = PrefixCache(4 * BLOCK_TOKENS)
    old, new = WORDS[: 2 * BLOCK_TOKENS], WORDS[-2 * BLOCK_TOKENS :]
    cache.keep(old, None)
    cache.keep(new, None)
    cache.look_up(old, None)
    cache.keep(WORDS[5 * BLOCK_TOKENS : 7 * BLOCK_TOKENS], None)
    assert cache.look_up(new, None) == 0
    assert cache.look_up(old, None) == BLOCK_TOKENS


async def test_next_turn_finds_the_turn_before_and_begins_sooner() -> None:
    settings = read_settings(
        engine="scripted", scripted_ttft_ms=0, scripted_itl_ms=0, scripted_prefill_us=200, scripted_cache_tokens=8192
    )
    engine = ScriptedEngine(settings)
    first = (WireMessage(role="user", content=" ".join(WORDS)),)
    text, began_s, hits = await _reply(engine, first)
    assert hits == 0
    assert began_s > 0.0002 * len(WORDS)
    turn = (*first, WireMessage(role="assistant", content=text), WireMessage(role="user", content="And then?"))
    _, again_s, hits = await _reply(engine, turn)
    assert hits > len(WORDS)
    assert again_s < began_s


async def _reply(engine: ScriptedEngine, messages: tuple[WireMessage, ...]) -> tuple[str, float, int]:
    """The text, the time to the first token, and the hits so far."""
    request = GenerateRequest(request_id="r", messages=messages, sampling=WireSampling(max_tokens=64))
    text, began_s, began = "", 0.0, time.monotonic()
    async with aclosing(engine.generate(request)) as batches:
        async for batch in batches:
            began_s = began_s or time.monotonic() - began
            text += "".join(item.text for item in batch if not isinstance(item, End))
            if isinstance(batch[-1], End):
                break
    lines = dict(line.split() for line in engine.metrics().decode().splitlines() if not line.startswith("#"))
    return text, began_s, int(lines["onebox_engine_prefix_hit_tokens_total"])
