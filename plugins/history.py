"""The prompt of a conversation: the system text, then the newest turns that fit the model's context.

Nothing is counted while the texts' bytes show that they fit: byte-level tokenizers make at most one token a byte.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from onebox.events import Check, TextDelta
from onebox.messages import Message, system
from onebox.plugin import LLM, Context, Sampling, Task
from plugins.repetition import PERIOD_MAX, STEP, TIMES, goes_in_circles, is_wanted

MESSAGE_TOKENS: Final = 16
REPLY_TOKENS: Final = 1024
DROP: Final = 8


def room_for_prompt(llm: LLM, sampling: Sampling) -> int:
    """Tokens left for the prompt when the reply gets its share, a quarter of the context at most."""
    return llm.context_length - min(sampling.max_tokens or REPLY_TOKENS, llm.context_length // 4)


def most_tokens(messages: Sequence[Message]) -> int:
    """A bound from above on the rendered prompt's tokens, without asking the engine."""
    return sum(len(message.text.encode()) + MESSAGE_TOKENS for message in messages)


async def fits(llm: LLM, messages: Sequence[Message], room: int) -> bool:
    """Whether the prompt takes at most `room` tokens; asks the engine only where the bytes don't tell."""
    return most_tokens(messages) <= room or await llm.count_tokens(messages) <= room


async def build_prompt(llm: LLM, instructions: str, messages: Sequence[Message], sampling: Sampling) -> list[Message]:
    """The system text and the newest turns that fit; the last message stays even where it does not.

    Long conversations lose eight messages at a time, so that the prompt's beginning, which the engine has cached,
    moves seldom. Between two counts the share of tokens per byte of the first one serves as an estimate.
    """
    given = [message.text for message in messages if message.role == "system"]
    head = system("\n\n".join([instructions, *given]))
    turns = [message for message in messages if message.role != "system"]
    room = room_for_prompt(llm, sampling)
    while len(turns) > 1 and (most := most_tokens([head, *turns])) > room:
        counted = await llm.count_tokens([head, *turns])
        if counted <= room:
            break
        turns = _drop_oldest(turns)
        while len(turns) > 1 and most_tokens([head, *turns]) * counted / most > room:
            turns = _drop_oldest(turns)
    return [head, *turns]


async def stream_reply(
    ctx: Context, task: Task, instructions: str, *, temperature: float, messages: Sequence[Message] | None = None
) -> AsyncGenerator[TextDelta | Check, None]:
    """The engine's reply to the conversation, `temperature` being the task's own where the caller set none.

    A reply that goes in circles is ended, and a failed check says so.
    """
    sampling = with_temperature(task.sampling, temperature)
    prompt = await build_prompt(ctx.llm, instructions, task.messages if messages is None else messages, sampling)
    guarded = not is_wanted(task.text)
    said, looked = "", 0
    async with aclosing(ctx.llm.stream(prompt, sampling)) as deltas:
        async for delta in deltas:
            yield delta
            said = (said + delta.text)[-PERIOD_MAX * TIMES :] if guarded else ""
            looked += len(delta.text)
            if guarded and looked >= STEP:
                looked = 0
                if goes_in_circles(said):
                    yield Check("repetition", False, "The reply went in circles and was ended.")
                    return


def with_temperature(sampling: Sampling, temperature: float) -> Sampling:
    """The caller's sampling, with this temperature where it has none."""
    return sampling if sampling.temperature is not None else replace(sampling, temperature=temperature)


def _drop_oldest(turns: list[Message]) -> list[Message]:
    """The turns without the oldest ones; begins with the user again, and always has the last."""
    rest = turns[min(DROP if len(turns) > 3 * DROP else 1, len(turns) - 1) :]
    while len(rest) > 1 and rest[0].role != "user":
        rest = rest[1:]
    return rest
