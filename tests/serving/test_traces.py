"""A caller's trace goes on in vLLM."""

import asyncio

import pytest

from tests.collector import Collector
from tests.serving.wire import Wire

TRACE, CALL = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.engine
@pytest.mark.timeout(900)
async def test_vllm_adds_its_span_below_the_engine_call(plain_wire: Wire, collector: Collector) -> None:
    await plain_wire.generate(traceparent=f"00-{TRACE}-{CALL}-01")
    async with asyncio.timeout(20):
        while not (spans := [span for span in collector.named("llm_request") if span.trace == TRACE]):
            await asyncio.sleep(0.05)
    assert [span.parent for span in spans] == [CALL]
