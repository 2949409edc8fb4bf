"""The product as shipped, with a real model on vLLM and a real browser: a stranger's first minutes."""

import re

from openai import AsyncOpenAI, OpenAI
from playwright.async_api import Browser, expect

from tests.product import KEY, Product

REPLY = "#ob-chat .bot-row .prose"
COUNT_STEPS = """() => {
  window.lengths = new Set();
  new MutationObserver(() => {
    const found = [...document.querySelectorAll('#ob-chat .bot-row .prose')].pop();
    if (found) window.lengths.add(found.textContent.length);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


async def test_a_person_types_sees_the_reply_grow_stops_regenerates_and_finds_it_again(
    real_product: Product, browser: Browser
) -> None:
    page = await browser.new_page(locale="en-US")
    await page.goto(real_product.ui_url)
    await expect(page.locator("#ob-app.ob-ready")).to_be_visible(timeout=30_000)
    await page.evaluate(COUNT_STEPS)
    await page.fill("#ob-input textarea", "Write a short story about a lighthouse.")
    await page.keyboard.press("Enter")
    await page.wait_for_function("window.lengths.size >= 4", timeout=60_000)
    await page.click("#ob-stop")
    await expect(page.locator("#ob-stop")).to_be_hidden(timeout=30_000)
    stopped = await page.locator(REPLY).last.inner_text()
    assert re.search(r"\w{3,}", stopped)
    await expect(page.locator(".ob-chip summary").last).to_contain_text("%")

    await page.click("#ob-chat button[aria-label=Retry]")
    await expect(page.locator(".ob-variants")).to_contain_text("2 / 2")
    await expect(page.locator("#ob-stop")).to_be_hidden(timeout=120_000)
    await expect(page.locator("#ob-beacon [data-state=idle]")).to_be_attached(timeout=30_000)
    again = await page.locator(REPLY).last.inner_text()

    await page.reload()
    await expect(page.locator(REPLY).last).to_have_text(again, use_inner_text=True, timeout=30_000)
    await page.close()


async def test_the_stock_openai_client_streams_with_usage_and_logprobs(real_product: Product) -> None:
    async with AsyncOpenAI(base_url=f"{real_product.api_url}/v1", api_key=KEY) as client:
        stream = await client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
        )
        text, tokens, usage = "", 0, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                tokens += len(choice.logprobs.content or []) if choice.logprobs else 0
    assert "Paris" in text
    assert usage is not None
    assert usage.completion_tokens >= tokens > 3


def test_greedy_replies_repeat_and_every_model_name_answers(real_product: Product) -> None:
    with OpenAI(base_url=f"{real_product.api_url}/v1", api_key=KEY) as client:
        names = [model.id for model in client.models.list()]
        assert {"auto", "summarize", "translate", "qa", "reason", "write", "chat", "smollm2-135m"} <= set(names)

        def reply(model: str) -> str:
            done = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "Name three colours."}],
                max_tokens=16,
                temperature=0,
            )
            return done.choices[0].message.content or ""

        assert reply("qa") == reply("qa") != ""
        assert reply("smollm2-135m")
