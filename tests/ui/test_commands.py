import pytest

from onebox.records import TaskInfo
from ui.commands import Command, UnknownCommand, parse_command

TASKS = [TaskInfo("translate", {"en": "Translate", "zh": "翻译"}), TaskInfo("qa", {"en": "Answer", "zh": "问答"})]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("/translate good morning", Command("translate", "good morning")),
        ("/翻译 早上好", Command("translate", "早上好")),
        ("  /QA why?\nreally ", Command("qa", "why?\nreally")),
        ("/answer", Command("qa", "")),
        ("/poem about rain", UnknownCommand("poem")),
        ("/usr/bin/env is what?", None),
        ("a / b", None),
        ("/", None),
        ("// comment", None),
    ],
)
def test_slash_word_picks_a_task_by_name_or_title_and_paths_stay_text(message: str, expected: object) -> None:
    assert parse_command(message, TASKS) == expected
