"""Starting and ending the product and its peers for tests and benchmarks, each on ports of its own."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onebox.sockets import free_port

ROOT = Path(__file__).resolve().parent.parent
KEY = "ob-bench-key-0123456789abcdef"


@dataclass(frozen=True, slots=True)
class Product:
    """A running `python -m deploy up`."""

    api_url: str
    ui_url: str
    home: Path
    pid: int
    ready_s: float
    page_s: float


@contextmanager
def process(
    argv: Sequence[str], ready_url: str, log: Path, env: Mapping[str, str] | None = None, timeout_s: float = 240
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until the block ends; the block starts when `ready_url` answers 200."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            argv, stdout=output, stderr=output, env={**os.environ, **(env or {})}, cwd=ROOT, start_new_session=True
        )
    try:
        wait_for(ready_url, child, log, timeout_s)
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(90)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_for(url: str, child: subprocess.Popen[bytes], log: Path, timeout_s: float) -> float:
    """Seconds until `url` answered 200. Raises `RuntimeError` with the log's end when it never does."""
    started = time.monotonic()
    while time.monotonic() - started < timeout_s:
        if child.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return time.monotonic() - started
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not answer; the log ends with:\n{log.read_text(errors='replace')[-2000:]}")


@contextmanager
def product(home: Path, env: Mapping[str, str]) -> Iterator[Product]:
    """The whole product with its own ports and `home`."""
    api, page, engine = free_port(), free_port(), free_port()
    variables = {
        "ONEBOX_HOME": str(home),
        "ONEBOX_ADMIN_KEY": KEY,
        "ONEBOX_API_PORT": str(api),
        "ONEBOX_UI_PORT": str(page),
        "ONEBOX_ENGINE_PORT": str(engine),
        **env,
    }
    home.mkdir(parents=True, exist_ok=True)
    argv = (sys.executable, "-m", "deploy", "up")
    log = home / "up.log"
    started = time.monotonic()
    with process(argv, f"http://127.0.0.1:{page}/", log, variables) as child:
        page_s = time.monotonic() - started
        wait_for(f"http://127.0.0.1:{api}/readyz", child, log, 240)
        ready_s = time.monotonic() - started
        yield Product(f"http://127.0.0.1:{api}", f"http://127.0.0.1:{page}", home, child.pid, ready_s, page_s)


@contextmanager
def bare_vllm(model: Path, context_length: int, log: Path, env: Mapping[str, str], *more: str) -> Iterator[str]:
    """vLLM's own OpenAI server with the arguments the product gives its engine, and `more`. Yields its URL."""
    port = free_port()
    argv = (
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", "bare", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "bfloat16", "--max-model-len", str(context_length), "--max-num-seqs", "64", "--enforce-eager",
        "--disable-uvicorn-access-log", *more,
    )  # fmt: skip
    with process(argv, f"http://127.0.0.1:{port}/health", log, env):
        yield f"http://127.0.0.1:{port}"
