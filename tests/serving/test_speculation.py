"""Drafts and adapters against vLLM as it comes: the same model, with neither."""

import asyncio
import math
import re

import pytest

from tests.serving.conftest import ADAPTERS
from tests.serving.wire import Reply, Wire

COPY = (
    "Repeat this text word for word: The harbour bridge of Lisbon opened in 1966 and is 2277 metres long. Ana Moreira "
    "counted 412 boats below the harbour bridge of Lisbon on Monday, and 398 boats on Tuesday."
)
FIX = "Correct the mistakes and change nothing else: Last week we was in the factory. She explain that the line work."
STORY = "Tell me a story about a small boat."
TOKENS = 64
ENOUGH = 100  # accepted drafts; which seeds copy the text is another on another processor
TIE = 0.126  # a step of bfloat16 where logits are 16 to 32, and a little

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
directly = pytest.mark.parametrize("wire", ["vllm-direct"], indirect=True)
either = pytest.mark.parametrize(
    "wire", ["vllm-direct", pytest.param("vllm-haproxy", marks=pytest.mark.faults)], indirect=True
)


@either
@pytest.mark.parametrize("content", [COPY, FIX, STORY])
async def test_drafts_do_not_change_a_greedy_text(wire: Wire, plain_wire: Wire, content: str) -> None:
    drafted = await wire.generate(content, sampling=_long())
    await _assert_greedy(drafted, content, plain_wire)


@directly
async def test_copied_text_takes_fewer_steps_than_tokens(wire: Wire) -> None:
    before = await _drafts(wire)
    reply = await wire.generate(COPY, sampling=_long())
    drafted, accepted = (now - then for now, then in zip(await _drafts(wire), before, strict=True))
    assert drafted >= accepted > len(reply.ids) / 4


@directly
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_logprobs_are_those_of_the_drawn_tokens_in_drafted_text(wire: Wire, temperature: float) -> None:
    sampling = _long() | {"top_logprobs": 2, "temperature": temperature, "seed": 3}
    reply = await wire.generate(COPY, sampling=sampling)
    tokens = [token for frame in reply.frames for token in frame["tokens"]]  # type: ignore[attr-defined]  # JSON list
    assert [token["id"] for token in tokens] == reply.ids
    if temperature == 0.0:
        # Where two are exactly alike, as bfloat16 rounds them, either may be drawn.
        assert all(token["logprob"] == token["top"][0]["logprob"] for token in tokens)


@directly
async def test_likeliest_token_of_a_drafted_text_is_drawn_as_often_as_its_probability_says(wire: Wire) -> None:
    begun = (await wire.generate(COPY, sampling={"max_tokens": 16})).ids  # a copy goes on more often than it begins
    _, before = await _drafts(wire)
    excess = variance = accepted = 0.0
    start = 0
    while accepted <= ENOUGH:  # it is the accepted drafts that this is about
        assert start < 400, f"{accepted:.0f} drafted tokens were accepted in {start} replies"
        sampling = {"max_tokens": 32, "temperature": 1.0, "top_p": 1.0, "top_logprobs": 1, "ignore_eos": True}
        asked = [wire.generate(COPY, sampling=sampling | {"seed": start + n}, resume_token_ids=begun) for n in range(4)]
        for reply in await asyncio.gather(*asked):
            for token in (token for frame in reply.frames for token in frame["tokens"]):  # type: ignore[attr-defined]
                (likeliest,) = token["top"]
                share = math.exp(likeliest["logprob"])
                excess += (token["id"] == likeliest["id"]) - share
                variance += share * (1 - share)
        start += 4
        accepted = (await _drafts(wire))[1] - before
    assert abs(excess) < 4 * math.sqrt(variance)


@directly
@pytest.mark.parametrize("structured", [{"choice": ["the harbour bridge of Lisbon", "the harbour bridge of Porto"]}])
async def test_choice_holds_where_the_text_suggests_another_word(wire: Wire, structured: dict[str, object]) -> None:
    reply = await wire.generate(f"{COPY} What does Ana count boats below?", structured=structured)
    assert reply.text in structured["choice"]  # type: ignore[operator]  # a list
    assert reply.end["finish"] == "stop"


@directly
@pytest.mark.parametrize("cut", [1, 9, 30])
async def test_drafted_reply_goes_on_where_it_broke_off(wire: Wire, cut: int) -> None:
    whole = await wire.generate(COPY, sampling=_long())
    rest = await wire.generate(COPY, sampling=_long() | {"max_tokens": TOKENS - cut}, resume_token_ids=whole.ids[:cut])
    assert rest.ids[:8] == whole.ids[cut : cut + 8]
    assert rest.end["usage"]["completion_tokens"] == TOKENS - cut  # type: ignore[index]  # JSON object


@directly
async def test_one_token_prompt_beside_a_drafted_reply_is_answered(wire: Wire) -> None:
    async with asyncio.TaskGroup() as group:
        long = group.create_task(wire.generate(COPY, sampling={"max_tokens": 200, "ignore_eos": True}))
        for token in (5, 6, 7):
            short = await wire.generate(messages=None, prompt_token_ids=[token], sampling={"max_tokens": 2})
            assert len(short.ids) <= 2
    assert len(long.result().ids) == 200


@directly
async def test_adapter_changes_the_text_and_the_model_beside_it_stays_as_it_is(wire: Wire, plain_wire: Wire) -> None:
    asked = [wire.generate(STORY, sampling=_long(), **fields) for fields in ({"adapter": ADAPTERS[0]}, {}, {})]
    adapted, *bare = await asyncio.gather(*asked)
    other = await wire.generate(STORY, sampling=_long(), adapter=ADAPTERS[1])
    again = await wire.generate(STORY, sampling=_long(), adapter=ADAPTERS[0])
    assert len({adapted.text[:40], other.text[:40], bare[0].text[:40]}) == 3
    assert adapted.text[:40] == again.text[:40]
    for reply in bare:
        await _assert_greedy(reply, STORY, plain_wire)


@pytest.mark.parametrize("wire", ["scripted-direct", "vllm-direct"], indirect=True)
async def test_adapters_are_on_the_card_and_unknown_ones_are_refused_by_name(wire: Wire) -> None:
    async with wire.client() as client:
        assert (await client.get("/v1/model")).json()["adapters"] == list(ADAPTERS)
    plain, adapted = await wire.generate(STORY), await wire.generate(STORY, adapter=ADAPTERS[0])
    assert plain.text != adapted.text
    refused = await wire.refused(STORY, adapter="nobody")
    assert refused.status_code == 400
    assert all(name in refused.json()["error"]["message"] for name in ("nobody", *ADAPTERS))


async def _assert_greedy(reply: Reply, content: str, plain: Wire) -> None:
    """The reply is the plain engine's, or leaves it where two tokens are as likely to bfloat16.

    How many tokens a step computes changes the order of its sums, so a tie may fall either way, with drafts as with
    other requests in the batch; from there on the reply is compared with what follows its own words.
    """
    ids, at = reply.ids, 0
    while at < len(ids):
        rest = await plain.generate(
            content,
            sampling={"max_tokens": len(ids) - at, "top_logprobs": 5, "ignore_eos": True, "temperature": 0},
            resume_token_ids=ids[:at],
        )
        same = next((n for n, pair in enumerate(zip(ids[at:], rest.ids, strict=True)) if pair[0] != pair[1]), None)
        if same is None:
            return
        tokens = [token for frame in rest.frames for token in frame["tokens"]]  # type: ignore[attr-defined]  # JSON list
        likely = {rival["id"]: rival["logprob"] for rival in tokens[same]["top"]}
        assert max(likely.values()) - likely.get(ids[at + same], -math.inf) <= TIE, f"token {at + same}: {likely}"
        at += same + 1


def _long() -> dict[str, object]:
    return {"max_tokens": TOKENS, "ignore_eos": True}


async def _drafts(wire: Wire) -> tuple[float, float]:
    """Tokens drafted and tokens accepted so far."""
    async with wire.client() as client:
        metrics = (await client.get("/metrics")).text
    names = ("num_draft_tokens_total", "num_accepted_tokens_total")
    found = [re.search(rf"^vllm:spec_decode_{name}\S* (\S+)$", metrics, re.MULTILINE) for name in names]
    drafted, accepted = (float(match.group(1)) if match else 0.0 for match in found)
    return drafted, accepted
