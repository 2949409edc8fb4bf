"""`python -m deploy up` as a user meets it: what it prints, what it starts, what it leaves behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from deploy import instance
from deploy.guardian import marked
from onebox.sockets import free_port
from tests.e2e.conftest import SCRIPTED
from tests.product import KEY, ROOT, Product, product


def deploy(*words: str, timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "deploy", *words),
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def ask(scripted_product: Product, text: str) -> httpx.Response:
    return httpx.post(
        f"{scripted_product.api_url}/v1/chat/completions",
        json={"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 8},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=30,
    )


def test_everything_answers_once_it_says_ready(scripted_product: Product) -> None:
    assert httpx.get(scripted_product.ui_url).status_code == 200
    assert httpx.get(f"{scripted_product.api_url}/readyz").status_code == 200
    reply = ask(scripted_product, "hello").json()
    assert reply["choices"][0]["message"]["content"]
    assert reply["usage"]["completion_tokens"] == 8


def test_status_names_every_part_and_says_ready(scripted_product: Product) -> None:
    done = deploy("status", ONEBOX_HOME=str(scripted_product.home))
    assert done.returncode == 0, done.stderr
    for name in ("store", "gateway-0", "gateway-1", "page", "engine", "Ready"):
        assert name in done.stdout


def test_a_second_up_in_the_same_home_says_where_the_first_one_is(scripted_product: Product) -> None:
    done = deploy("up", ONEBOX_HOME=str(scripted_product.home), ONEBOX_ENGINE="scripted")
    assert done.returncode == 1
    assert "already running" in done.stderr
    assert scripted_product.ui_url in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_taken_port_is_one_line_and_exit_code_1(scripted_product: Product, tmp_path: Path) -> None:
    port = scripted_product.api_url.rpartition(":")[2]
    done = deploy("up", ONEBOX_HOME=str(tmp_path), ONEBOX_ENGINE="scripted", ONEBOX_API_PORT=port)
    assert done.returncode == 1
    assert f"Port {port} on 127.0.0.1 is taken" in done.stderr
    assert "ONEBOX_API_PORT" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_killed_gateway_worker_comes_back_while_requests_keep_being_answered(scripted_product: Product) -> None:
    process = psutil.Process(scripted_product.pid)
    (worker,) = (child for child in process.children() if child.cmdline()[2:3] == ["agents"] and _first(child))
    worker.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert ask(scripted_product, "still there?").status_code == 200
        workers = [child for child in process.children() if child.cmdline()[2:3] == ["agents"]]
        if len(workers) == 2 and worker.pid not in {child.pid for child in workers}:
            return
    pytest.fail("the killed worker did not come back in 30 s")


def _first(process: psutil.Process) -> bool:
    siblings = [child for child in process.parent().children() if child.cmdline()[2:3] == ["agents"]]
    return process.pid == min(child.pid for child in siblings)


def test_nothing_but_what_was_said_is_left_however_up_ends(tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with product(tmp_path, SCRIPTED) as started:
        made = httpx.post(f"{started.api_url}/v1/conversations", json={"title": "kept"}, headers=headers).json()
        _end_of(started, signal.SIGKILL)
    with product(tmp_path, SCRIPTED) as again:
        kept = httpx.get(f"{again.api_url}/v1/conversations/{made['id']}", headers=headers)
        assert kept.json()["title"] == "kept"
        _end_of(again, signal.SIGINT)


def _end_of(started: Product, signum: signal.Signals) -> None:
    """End `up` and see that no process of it is left."""
    found = instance.read(started.home)
    assert found is not None
    family = psutil.Process(started.pid).children(recursive=True)
    assert len(family) >= 6
    os.kill(started.pid, signum)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    assert marked(found.id) == set()


def test_doctor_says_what_is_wrong_and_what_to_do() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = deploy("doctor", ONEBOX_API_PORT=port, ONEBOX_UI_PORT=str(free_port()), ONEBOX_ENGINE="scripted")
    assert done.returncode == 1
    assert f"Port {port} on 127.0.0.1 is taken" in done.stdout
    assert "ONEBOX_API_PORT" in done.stdout


def test_down_without_an_instance_says_so(tmp_path: Path) -> None:
    done = deploy("down", ONEBOX_HOME=str(tmp_path))
    assert done.returncode == 0
    assert "not running" in done.stdout


@pytest.mark.faults
def test_a_model_that_does_not_load_ends_up_with_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "broken-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    done = deploy(
        "up",
        timeout_s=180,
        ONEBOX_HOME=str(tmp_path / "home"),
        ONEBOX_MODEL=str(folder),
        ONEBOX_API_PORT="0",
        ONEBOX_UI_PORT="0",
        ONEBOX_ENGINE_PORT="0",
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("onebox: The engine did not start")
