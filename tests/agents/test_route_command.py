"""`python -m agents.route`."""

import json
import subprocess
import sys
from pathlib import Path


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


def test_route_command_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agents.route", str(tmp_path / "none.jsonl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Cannot route" in done.stderr
