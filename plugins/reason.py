"""Step-by-step reasoning. What is plain arithmetic is computed, not guessed: before the reply where the question asks
for it, and after it to check each equation the model wrote.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import ClassVar, Final

from onebox.events import Check, Event, TextDelta
from onebox.messages import user
from onebox.plugin import Context, Example, Lang, Plugin, Task, TaskParams
from plugins.arithmetic import find_equations, find_sums, show
from plugins.history import stream_reply
from plugins.language import reply_lang
from plugins.prompts import Prompts

TEMPERATURE: Final = 0.0


class Reason(Plugin):
    """Works problems out."""

    name = "reason"
    version = "1.0"
    title: ClassVar[Mapping[Lang, str]] = {"en": "Reason", "zh": "推理"}
    summary: ClassVar[Mapping[Lang, str]] = {
        "en": "Solve problems step by step and check the sums",
        "zh": "一步一步解题，并验算",
    }
    examples = (
        Example("en", "What is 37 * 48 + 12?"),
        Example("en", "Pens cost 3 dollars each. I buy 7 and pay with 50 dollars. How much change do I get?"),
        Example("en", "A car drives 60 km per hour for 3 hours. How far does it go?"),
        Example("en", "Tom is taller than Ann, and Ann is taller than Sue. Who is the shortest?"),
        Example("zh", "计算 25 × 16 − 80"),
        Example("zh", "(128 + 72) × 3 等于多少？"),
        Example("zh", "一辆车每小时行驶60公里，3小时能走多远？"),
        Example("zh", "一本书有120页，每天读20页，几天能读完？"),
    )
    counter_examples = (
        Example("en", "Who discovered the number zero?"),
        Example("en", "Write a story about a man who counts apples."),
        Example("zh", "数字零是谁发明的？"),
        Example("zh", "写一个数苹果的小故事。"),
    )

    class Params(TaskParams):
        """Whether to check."""

        check: bool = True

    def __init__(self) -> None:
        self._prompts = Prompts(self.name)

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        """The steps and the answer, then a check for each equation in them."""
        assert isinstance(task.params, self.Params)
        lang = reply_lang(task.text)
        sums = find_sums(task.text)
        question = task.text
        if sums:
            facts = "; ".join(f"{expression} = {show(value)}" for expression, value in sums)
            question = f"{task.text}\n{self._prompts.text('computed', lang, facts=facts)}"
        messages = [*task.messages[:-1], user(question)]
        said: list[str] = []
        rules = self._prompts.text("system", lang)
        async with aclosing(stream_reply(ctx, task, rules, temperature=TEMPERATURE, messages=messages)) as deltas:
            async for delta in deltas:
                if isinstance(delta, TextDelta):
                    said.append(delta.text)
                yield delta
        if not task.params.check:
            return
        for equation in find_equations("".join(said)):
            right = f"{equation.left} = {show(equation.value)}"
            detail = right if equation.holds else self._prompts.text("wrong", lang, right=right, claimed=equation.right)
            yield Check("arithmetic", equation.holds, detail)
