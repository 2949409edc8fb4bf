"""The page in a real Chromium, over the real gateway, a real Valkey and the scripted engine."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.async_api import Browser, BrowserContext, Page, expect

from tests.ui.stack import Stack, run_stack, wait_until

Open = Callable[..., Awaitable[Page]]
TEXT = "#ob-chat .bot-row .prose"
RECEIPT = re.compile(r"Stopped after \d+ tokens; slot free after \d+ ms")
TEXTS_JS = """() => {
  window.seen = new Set();
  const look = () => {
    const found = [...document.querySelectorAll('#ob-chat .bot-row .prose')].pop();
    if (found) window.seen.add(found.textContent.length);
  };
  new MutationObserver(look).observe(document, {childList: true, subtree: true, characterData: true});
}"""


@pytest.fixture
async def open_page(browser: Browser, stack: Stack) -> AsyncIterator[Open]:
    """Opens pages that may reach nothing but this machine and must log no error."""
    contexts: list[BrowserContext] = []
    bad: list[str] = []

    async def open_(path: str = "/", url: str = stack.ui_url, **options: object) -> Page:
        viewport = {"width": 1200, "height": 800}
        context = await browser.new_context(**{"locale": "en-US", "viewport": viewport} | options)  # type: ignore[arg-type]
        contexts.append(context)
        page = await context.new_page()
        page.on("pageerror", lambda error: bad.append(str(error)))
        page.on("request", lambda asked: None if _is_local(asked.url) else bad.append(asked.url))
        await page.goto(url + path)
        await expect(page.locator("#ob-app.ob-ready")).to_be_visible(timeout=30_000)
        return page

    yield open_
    for context in contexts:
        await context.close()
    assert bad == []


def _is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))


async def enter(page: Page, text: str) -> None:
    await page.fill("#ob-input textarea", text)
    await page.keyboard.press("Enter")


async def say(page: Page, text: str) -> None:
    """Send a message and wait until the page has taken it: before that it still looks done with the one before."""
    count = await page.locator("#ob-chat .user-row").count()
    await enter(page, text)
    await expect(page.locator("#ob-chat .user-row")).to_have_count(count + 1)


async def until_done(page: Page) -> None:
    await expect(page.locator("#ob-stop")).to_be_hidden(timeout=60_000)
    await expect(page.locator("#ob-beacon [data-state=idle]")).to_be_attached(timeout=60_000)


async def ask(page: Page, text: str) -> str:
    """Send a message, stop the long reply once some of it is there, and return what was written."""
    await say(page, text)
    await expect(page.locator(TEXT).last).not_to_be_empty()
    await page.click("#ob-stop")
    await until_done(page)
    return await page.locator(TEXT).last.inner_text()


async def reroute(page: Page, task: str, variants: str) -> None:
    """Have the last message answered as another task, and stop that reply too."""
    await page.click(".ob-chip summary")
    await page.click(f".ob-menu [data-task={task}]")
    await expect(page.locator(".ob-variants")).to_contain_text(variants)
    await expect(page.locator(TEXT).last).not_to_be_empty()
    await page.click("#ob-stop")
    await until_done(page)


def conversation(stack: Stack, page: Page) -> dict[str, object]:
    found: dict[str, object] = httpx.get(
        f"{stack.api_url}/v1/conversations/{page.url.split('?c=')[1]}", headers=stack.headers
    ).json()
    return found


def last_turn(stack: Stack, page: Page) -> dict[str, object]:
    turns = conversation(stack, page)["turns"]
    assert isinstance(turns, list)
    turn = turns[-1]
    assert isinstance(turn, dict)
    return turn


def only_variant(stack: Stack, page: Page) -> dict[str, object]:
    """The one answer there is to the last turn."""
    variants = last_turn(stack, page)["variants"]
    assert isinstance(variants, list)
    (variant,) = variants
    assert isinstance(variant, dict)
    return variant


async def here(page: Page) -> str:
    """The open conversation, for another browser, once this one knows it."""
    await page.wait_for_url("**/?c=*")
    return "/?" + page.url.split("?")[1]


async def test_reply_arrives_in_steps_with_the_task_on_it(open_page: Open) -> None:
    page = await open_page()
    await page.evaluate(TEXTS_JS)
    await say(page, "Write a short story about a lighthouse")
    await until_done(page)
    assert await page.evaluate("window.seen.size") >= 3
    await expect(page.locator(".ob-chip summary").last).to_contain_text("%")
    assert await page.input_value("#ob-input textarea") == ""


async def test_stop_frees_the_engine_and_keeps_what_was_written(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    await say(page, "Write a very long story about rain")
    await expect(page.locator(TEXT).last).not_to_be_empty()
    assert stack.engine_running() == 1
    await page.click("#ob-stop")
    wait_until(lambda: stack.engine_running() == 0, "the engine is free", 5)
    await until_done(page)
    await expect(page.locator("#ob-chat .ob-note")).to_contain_text("Stopped")
    wait_until(lambda: "stopped" in json.dumps(last_turn(stack, page)), "the record says so")


async def test_escape_stops_too_and_says_what_it_freed(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    await say(page, "Write a very long story about snow")
    await expect(page.locator(TEXT).last).not_to_be_empty()
    await page.keyboard.press("Escape")
    wait_until(lambda: stack.engine_running() == 0, "the engine is free", 5)
    await until_done(page)
    await expect(page.locator("#ob-chat .ob-note")).to_contain_text(RECEIPT)


async def test_closing_the_page_leaves_the_reply_to_be_found_later(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    await say(page, "Write a story about wind")
    await expect(page.locator(TEXT).last).not_to_be_empty()
    path = await here(page)
    await page.close()
    later = await open_page(path)
    await expect(later.locator("#ob-stop")).to_be_visible()
    await until_done(later)
    variant = only_variant(stack, later)
    assert variant["state"] == "completed"
    await expect(later.locator(TEXT).last).to_have_text(str(variant["text"]).strip())


async def test_reload_in_mid_reply_shows_it_grow_to_the_text_that_is_stored(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    await say(page, "Write a story about a harbour")
    await expect(page.locator(TEXT).last).not_to_be_empty()
    await here(page)
    await page.fill("#ob-input textarea", "what I wanted to add")
    await page.add_init_script(f"({TEXTS_JS})()")
    await page.reload()
    await expect(page.locator("#ob-stop")).to_be_visible()
    await expect(page.locator("#ob-input textarea")).to_have_value("what I wanted to add")
    await until_done(page)
    assert await page.evaluate("window.seen.size") >= 3
    variant = only_variant(stack, page)
    assert variant["state"] == "completed"
    await expect(page.locator(TEXT).last).to_have_text(str(variant["text"]).strip())


async def test_second_browser_sees_the_running_reply_and_stops_it_for_both(open_page: Open, stack: Stack) -> None:
    first = await open_page()
    await say(first, "Write a very long story about stars")
    await expect(first.locator(TEXT).last).not_to_be_empty()
    second = await open_page(await here(first))
    await expect(second.locator("#ob-stop")).to_be_visible()
    await expect(second.locator(TEXT).last).not_to_be_empty()
    await second.click("#ob-stop")
    wait_until(lambda: stack.engine_running() == 0, "the engine is free", 5)
    for page in (first, second):
        await until_done(page)
        await expect(page.locator("#ob-chat .ob-note")).to_contain_text(RECEIPT)
    variant = only_variant(stack, first)
    assert variant["state"] == "stopped"
    for page in (first, second):
        await expect(page.locator(TEXT).last).to_have_text(str(variant["text"]).strip())


async def test_reply_is_followed_when_its_chat_is_opened_from_the_list(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    await say(page, "Write a story about the list of chats")
    await expect(page.locator(TEXT).last).not_to_be_empty()
    await page.click(".ob-new")
    await expect(page.locator(".ob-welcome")).to_be_visible()
    await expect(page.locator("#ob-stop")).to_be_hidden()
    await page.locator("#ob-list .ob-open", has_text="about the list of chats").first.click()
    await expect(page.locator("#ob-stop")).to_be_visible()
    await until_done(page)
    assert only_variant(stack, page)["state"] == "completed"


async def test_message_into_a_busy_chat_comes_back_with_a_notice_and_the_running_reply(
    open_page: Open, stack: Stack
) -> None:
    first = await open_page()
    await ask(first, "Hello from here")
    second = await open_page(await here(first))
    await say(first, "Write a very long story about doors")
    await expect(first.locator(TEXT).last).not_to_be_empty()
    await enter(second, "Me too")
    await expect(second.locator(".ob-notice")).to_contain_text("Another reply is still being written")
    await expect(second.locator("#ob-input textarea")).to_have_value("Me too")
    await expect(second.locator("#ob-chat .user-row").last).to_have_text("Write a very long story about doors")
    await second.click("#ob-stop")
    await until_done(second)
    await until_done(first)
    await expect(second.locator("#ob-input textarea")).to_have_value("Me too")
    turns = conversation(stack, first)["turns"]
    assert isinstance(turns, list)
    assert len(turns) == 2


async def test_page_comes_back_by_itself_when_its_process_dies_in_mid_reply(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    await say(page, "Write a story about a phoenix")
    await expect(page.locator(TEXT).last).not_to_be_empty()
    await here(page)
    await page.fill("#ob-input textarea", "and then?")
    stack.kill("ui")
    try:
        await expect(page.locator(".ob-away")).to_contain_text("Reconnecting")
        await expect(page.locator("[data-testid=toast-body]")).to_be_hidden()
    finally:
        stack.start_ui()
    await expect(page.locator(".ob-away")).to_have_count(0, timeout=30_000)
    await expect(page.locator("#ob-app.ob-ready")).to_be_visible(timeout=30_000)
    await until_done(page)
    variant = only_variant(stack, page)
    assert variant["state"] == "completed"
    await expect(page.locator(TEXT).last).to_have_text(str(variant["text"]).strip())
    await expect(page.locator("#ob-input textarea")).to_have_value("and then?")


async def test_message_sent_while_the_pages_process_is_away_is_kept_and_sent_once(
    open_page: Open, stack: Stack
) -> None:
    page = await open_page()
    stack.kill("ui")
    try:
        await enter(page, "Nobody hears this")
        await expect(page.locator(".ob-away")).to_be_visible()
    finally:
        stack.start_ui()
    await expect(page.locator(".ob-away")).to_have_count(0, timeout=30_000)
    await expect(page.locator("#ob-input textarea")).to_have_value("Nobody hears this", timeout=30_000)
    await page.keyboard.press("Enter")
    await expect(page.locator(TEXT).last).not_to_be_empty()
    await page.click("#ob-stop")
    await until_done(page)
    turns = conversation(stack, page)["turns"]
    assert isinstance(turns, list)
    assert [turn["user"] for turn in turns] == ["Nobody hears this"]


async def test_regenerate_and_reroute_add_variants_of_the_same_turn(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    await ask(page, "Why is the sky blue?")
    await page.click("#ob-chat button[aria-label=Retry]")
    await expect(page.locator(".ob-variants")).to_contain_text("2 / 2")
    await page.click("#ob-stop")
    await until_done(page)
    await page.click(".ob-chip summary")
    await page.click(".ob-menu [data-task=reason]")
    await expect(page.locator(".ob-variants")).to_contain_text("3 / 3")
    await page.click("#ob-stop")
    await until_done(page)
    await expect(page.locator(".ob-chip summary")).to_contain_text("Reason")
    variants = last_turn(stack, page)["variants"]
    assert isinstance(variants, list)
    assert [variant["task"] for variant in variants][-1] == "reason"
    assert len(variants) == 3
    last = await page.locator(TEXT).last.inner_text()
    await page.click(".ob-variants button >> nth=0")
    await expect(page.locator(".ob-variants")).to_contain_text("2 / 3")
    assert await page.locator(TEXT).last.inner_text() != last


async def test_edit_replaces_the_message_and_its_answer(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    await ask(page, "What is the capital of France?")
    await page.click("#ob-chat button[aria-label=Edit]")
    await page.fill("#ob-chat textarea", "What is the capital of Peru?")
    await page.click("#ob-chat button[aria-label=Submit]")
    await expect(page.locator("#ob-chat .user-row")).to_contain_text("Peru")
    await until_done(page)
    turns = conversation(stack, page)["turns"]
    assert isinstance(turns, list)
    assert [turn["user"] for turn in turns] == ["What is the capital of Peru?"]


async def test_thumb_is_stored_and_shown_again_after_a_reload(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    text = await ask(page, "Hello there")
    await page.click("#ob-chat button[aria-label=Like]")
    wait_until(lambda: '"like"' in json.dumps(last_turn(stack, page)), "the thumb is stored")
    await page.reload()
    await expect(page.locator(TEXT).last).to_have_text(text, use_inner_text=True)
    await expect(page.locator("#ob-list [aria-current=page]")).to_have_text("Hello there")
    await expect(page.locator("#ob-chat button[aria-label=Liked]")).to_be_visible()


async def test_conversations_open_rename_export_and_delete_at_the_side(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    await ask(page, "First chat of this test")
    await page.click(".ob-new")
    await expect(page.locator(".ob-welcome")).to_be_visible()
    assert "?c=" not in page.url
    await ask(page, "Second chat of this test")
    row = page.locator("#ob-list li", has_text="First chat of this test")
    await row.locator(".ob-open").click()
    await expect(page.locator("#ob-chat .user-row")).to_have_text("First chat of this test")
    await row.hover()
    await row.locator("summary").click()
    await row.get_by_text("Rename").click()
    await page.fill(".ob-rename", "A better name")
    await page.keyboard.press("Enter")
    renamed = page.locator("#ob-list li", has_text="A better name")
    await expect(renamed).to_be_visible()
    await expect(page.locator(".ob-title")).to_have_text("A better name")
    await renamed.hover()
    await renamed.locator("summary").click()
    async with page.expect_download() as download:
        await renamed.get_by_text("Export as Markdown").click()
    path = await (await download.value).path()
    assert "First chat of this test" in Path(path).read_text(encoding="utf-8")
    await renamed.locator("summary").click()
    await renamed.get_by_text("Delete").click()
    await renamed.get_by_text("Delete for good?").click()
    await expect(renamed).to_have_count(0)
    await expect(page.locator(".ob-welcome")).to_be_visible()


async def test_chinese_browser_gets_chinese_and_may_switch(open_page: Open) -> None:
    page = await open_page(locale="zh-CN")
    await expect(page.locator(".ob-welcome h1")).to_have_text("今天想做点什么？")
    await expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    starter = page.locator(".ob-starters button").first
    assert any("\u4e00" <= letter <= "\u9fff" for letter in await starter.inner_text())
    await starter.click()
    assert await page.input_value("#ob-input textarea") in await starter.get_attribute("data-text")
    await page.click("[data-ob-local=language]")
    await expect(page.locator(".ob-welcome h1")).to_have_text("What shall we work on?")
    await page.reload()
    await expect(page.locator(".ob-welcome h1")).to_have_text("What shall we work on?")


async def test_chosen_task_wins_and_slash_words_choose_one(open_page: Open, stack: Stack) -> None:
    page = await open_page(locale="zh-CN")
    await page.select_option("#ob-task-select", "qa")
    await ask(page, "随便说点什么")
    await expect(page.locator(".ob-chip summary")).to_contain_text("手动选择")
    assert "qa" in json.dumps(last_turn(stack, page)["variants"])
    await enter(page, "/没有这个 你好")
    await expect(page.locator(".ob-notice")).to_contain_text("/没有这个")
    assert await page.input_value("#ob-input textarea") == "/没有这个 你好"
    await ask(page, "/翻译 早上好")
    await expect(page.locator("#ob-chat .user-row").last).to_have_text("早上好")
    await expect(page.locator(".ob-chip summary")).to_contain_text("翻译")


async def test_phone_width_has_no_sideways_scroll_and_a_drawer(open_page: Open) -> None:
    page = await open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not await page.evaluate(wide)
    await expect(page.locator(".ob-new")).to_be_hidden()
    await page.click(".ob-burger")
    await expect(page.locator(".ob-new")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.locator(".ob-new")).to_be_hidden()
    await ask(page, "W" * 400)
    assert not await page.evaluate(wide)


async def test_dark_follows_the_system_and_can_be_switched(open_page: Open) -> None:
    page = await open_page(color_scheme="dark")
    await expect(page.locator("body.dark")).to_be_attached()
    await page.click("[data-ob-local=theme]")
    await page.reload()
    await expect(page.locator("#ob-app.ob-ready")).to_be_visible()
    await expect(page.locator("body.dark")).to_have_count(0)


async def test_markup_in_a_message_stays_inert(open_page: Open) -> None:
    page = await open_page()
    await ask(page, 'Hi <img src=x onerror="window.hacked=1"><script>window.hacked=1</script>')
    await page.reload()
    await expect(page.locator("#ob-chat .user-row")).to_be_visible()
    assert await page.evaluate("window.hacked") is None


async def test_every_control_has_a_name_and_only_the_end_of_a_reply_is_announced(open_page: Open) -> None:
    page = await open_page()
    await ask(page, "Hello")
    unnamed = await page.evaluate(
        """() => [...document.querySelectorAll('button, a[href], select, textarea, summary')]
        .filter((e) => e.offsetParent && !(e.getAttribute('aria-label') || e.textContent.trim() || e.title
          || (e.labels && [...e.labels].some((l) => l.textContent.trim()))))
        .map((e) => e.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []
    assert await page.get_attribute("#ob-chat [role=log]", "aria-live") == "off"
    await expect(page.locator("body > [role=status]")).to_have_text("Reply stopped")


async def test_broken_reply_keeps_its_text_and_says_what_to_do(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    stack.restart_engine("--fail-at-token", "12")
    try:
        await say(page, "Write about bridges")
        await expect(page.locator(".ob-problem")).to_contain_text("Try again", timeout=30_000)
        await expect(page.locator(TEXT).last).not_to_be_empty()
    finally:
        stack.restart_engine()
    await until_done(page)
    await page.click(".ob-problem [data-ob=retry]")
    await expect(page.locator(".ob-problem")).to_have_count(0)
    await expect(page.locator(TEXT).last).not_to_be_empty()
    await until_done(page)


async def test_page_loads_without_anything_behind_it_and_sends_once_it_is_there(
    open_page: Open, tmp_path: Path
) -> None:
    with run_stack(tmp_path, engine=False, gateway=False, scripted_itl_ms="5") as late:
        page = await open_page(url=late.ui_url)
        await expect(page.locator(".ob-banner")).to_contain_text("does not answer yet")
        await say(page, "Are you there?")
        await expect(page.locator("#ob-chat .ob-wait")).to_contain_text("will be sent")
        late.start_gateway()
        await expect(page.locator(".ob-banner")).to_be_visible()
        late.start_engine()
        await expect(page.locator(TEXT).last).not_to_be_empty(timeout=60_000)
        await until_done(page)
        await expect(page.locator(".ob-banner")).to_have_count(0, timeout=30_000)
        turns = conversation(late, page)["turns"]
        assert isinstance(turns, list)
        assert [turn["user"] for turn in turns] == ["Are you there?"]
        memory = 0
        with suppress(psutil.NoSuchProcess):
            memory = psutil.Process(late.processes["ui"].pid).memory_info().rss
        assert memory < 300 * 2**20


async def test_message_that_waits_for_an_engine_shows_its_place_in_the_queue(open_page: Open, tmp_path: Path) -> None:
    small = {"engine_max_ongoing": "1", "scripted_itl_ms": "20", "max_tokens_default": "400"}
    with run_stack(tmp_path, **small) as stack:
        api = httpx.Client(base_url=stack.api_url, headers=stack.headers)

        def start() -> str:
            body = {"model": "chat", "input": "Tell a long story", "max_output_tokens": 400, "background": True}
            return str(api.post("/v1/responses", json=body).json()["id"])

        runs = [start() for _ in range(3)]
        wait_until(lambda: stack.engine_running() == 1, "the engine is busy")
        english, chinese = await open_page(url=stack.ui_url), await open_page(url=stack.ui_url, locale="zh-CN")
        await say(english, "Hello there")
        waiting = english.locator("#ob-chat .ob-wait")
        await expect(waiting).to_contain_text("Waiting: place 3")
        await say(chinese, "你好")
        await expect(chinese.locator("#ob-chat .ob-wait")).to_contain_text("排队中：第 4 位")
        api.post(f"/v1/responses/{runs[1]}/cancel")
        await expect(waiting).to_contain_text("Waiting: place 2")
        api.post(f"/v1/responses/{runs[0]}/cancel")
        await expect(waiting).to_contain_text(re.compile(r"Waiting: place 1, about \d+ s"))
        api.post(f"/v1/responses/{runs[2]}/cancel")
        await expect(english.locator(TEXT).last).not_to_be_empty()
        await expect(waiting).to_have_count(0)
        await english.click("#ob-stop")
        await until_done(english)
        await expect(chinese.locator(TEXT).last).not_to_be_empty()
        await chinese.click("#ob-stop")
        await until_done(chinese)
        api.close()


async def test_steps_of_a_plan_are_listed_and_those_to_come_can_be_taken_out(open_page: Open, stack: Stack) -> None:
    page = await open_page()
    text = "The ferry to the northern islands will stop running in November. Repairs to the pier cost too much."
    await say(page, f"Summarise this, then translate it into French and finally write a tweet about it: {text}")
    steps = page.locator("#ob-chat .ob-plan li")
    await expect(steps).to_have_count(3)
    await expect(steps.nth(0)).to_have_class("now")
    await expect(steps.nth(1)).to_contain_text("translate it into French")
    await expect(steps.nth(0).get_by_role("button")).to_have_count(0)
    await steps.nth(1).get_by_role("button", name="Leave this step out").click()
    await expect(steps).to_have_count(2, timeout=60_000)
    await expect(steps.nth(0)).to_have_class("done")
    await expect(steps.nth(1)).to_contain_text("Write")
    await expect(page.locator(TEXT).last).not_to_be_empty(timeout=60_000)
    await page.click("#ob-stop")
    await until_done(page)
    route = only_variant(stack, page)["route"]
    assert isinstance(route, dict)
    assert route["plan"] == ["summarize", "write"]
    await page.reload()
    await expect(page.locator("#ob-chat .ob-plan li")).to_have_count(2)


async def test_correction_is_noted_where_the_visitor_wants_that_and_can_be_undone(
    open_page: Open, stack: Stack
) -> None:
    def labels() -> list[dict[str, object]]:
        found: list[dict[str, object]] = httpx.get(f"{stack.api_url}/v1/labels", headers=stack.headers).json()["data"]
        return found

    page = await open_page()
    box = page.get_by_role("checkbox", name="Learn from my corrections")
    await expect(box).not_to_be_checked()
    await ask(page, "Why is the sea salty?")
    await reroute(page, "reason", "2 / 2")
    await expect(page.locator(".ob-noted")).to_have_count(0)
    await box.click()
    await expect(box).to_be_checked()
    await reroute(page, "write", "3 / 3")
    await expect(page.locator(".ob-noted")).to_contain_text("Noted for messages like this")
    assert [label["plan"] for label in labels()] == [["write"]]
    await page.reload()
    await expect(box).to_be_checked()
    await page.locator(".ob-noted").get_by_role("button", name="Undo").click()
    await expect(page.locator(".ob-noted")).to_have_count(0)
    assert labels() == []
    await box.click()
    await expect(box).not_to_be_checked()
