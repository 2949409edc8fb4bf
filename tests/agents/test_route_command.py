"""`python -m agents.route`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agents.labelled import read_records
from agents.route import main


def test_route_command_writes_one_decision_per_line(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    lines = [{"id": "a", "messages": [{"role": "user", "content": "写一首诗"}], "task": "write", "lang": "zh"}]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "agents.route", str(path)], capture_output=True, text=True, check=True)
    decision = json.loads(done.stdout)
    assert decision["id"] == "a"
    assert decision["task"] == "write"
    assert set(decision) == {"id", "task", "probabilities", "plan", "tier", "ms"}
    scored = subprocess.run(
        [sys.executable, "-m", "agents.route", "--eval", str(path)], capture_output=True, text=True, check=True
    )
    assert "accuracy 1.0000" in scored.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("", "nothing in it"),
        ("{}\n", "messages"),
        ('{"id": "a", "messages": [1]}', "'a'"),
        ('{"id": "a", "messages": [{"role": "user", "content": null}]}', "'a'"),
        ('{"id": "a", "messages": [{"role": "user", "content": "hi"}], "plan": "qa"}', "'a'"),
        ("[]", "line 1"),
        ("\n{", "line 2"),
    ],
)
def test_route_command_says_what_is_wrong_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    path = tmp_path / "some.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert main(["--eval", str(path)]) == 2
    told = capsys.readouterr().err
    assert "Cannot route" in told
    assert said in told


def test_other_line_ends_of_unicode_may_stand_in_a_record(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"content": "a\u2028b\u0085c"}\n\n{"content": "d"}\n', encoding="utf-8")
    assert [record["content"] for record in read_records(path)] == ["a\u2028b\u0085c", "d"]
