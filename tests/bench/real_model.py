"""What benchmarks with a real model share: the model, homes that have it, a bare vLLM server beside the product."""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from onebox.settings import read_settings
from onebox.testing import ScriptedContext, collect
from plugins.registry import load_plugins
from serving.fetch import ensure
from tests.processes import models_home
from tests.product import bare_vllm, product

THREADS: Final = str(os.cpu_count() or 1)
VLLM_ENV: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": THREADS,
    "HF_HUB_OFFLINE": "1",
}


async def fetch(model: str) -> Path:
    """The folder of a model of the catalogue."""
    return Path((await asyncio.to_thread(ensure, read_settings(home=models_home(), model=model))).path)


@contextmanager
def fresh_home() -> Iterator[Path]:
    """An `ONEBOX_HOME` that is gone afterwards; its models are those of `models_home`."""
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        home = Path(folder)
        (home / "models").symlink_to(models_home() / "models")
        yield home


@contextmanager
def beside_bare(model: str, folder: Path, context: int) -> Iterator[tuple[str, str]]:
    """The URLs of the product and of a bare vLLM server, which serve the same model with the same arguments."""
    with fresh_home() as home:
        env = {"ONEBOX_MODEL": model, "ONEBOX_MODEL_CONTEXT": str(context), "ONEBOX_CPU_THREADS": THREADS}
        with product(home, env) as ours, bare_vllm(folder, context, home / "bare.log", VLLM_ENV) as bare:
            yield ours.api_url, bare


async def as_the_plugin_sends(task: str, text: str) -> list[dict[str, str]]:
    """The messages that the task's plugin sends to the engine for this text: a peer gets the very same."""
    context = ScriptedContext(replies=["…"])
    await collect(load_plugins((task,))[task], text, ctx=context)
    (call,) = context.calls
    return [{"role": message.role, "content": message.text} for message in call.messages]
