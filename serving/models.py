"""Which model this machine serves: the setting, the free GPU memory and the catalogue made into a folder on disk.

What models there are is in `serving.catalogue`; how one gets here in `serving.download`.
"""

import importlib.metadata
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from onebox.errors import SetupError
from onebox.settings import Settings
from serving.catalogue import Model, find, load_catalogue
from serving.download import GIB, NotReached, download, folder_of, is_present
from serving.progress import Report, quiet

CPU_DEFAULT = "qwen2.5-coder-0.5b"
CPU_CONTEXT = 8192
PROCESS_GIB = 1.3
GPU_HOST_GIB = 6.0


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this disk: its public name, its folder, and the tokens of context it is served with."""

    alias: str
    path: str
    context_length: int | None


def resolve(settings: Settings, report: Report = quiet) -> ResolvedModel:
    """The model of the settings, fetched if it is not here yet; needs no network if it is.

    Raises:
        SetupError: it is unknown, cannot be fetched, or has less context than `settings.model_context` asks for.
    """
    gpu_gib = gpu_free_gib(settings.tensor_parallel * settings.pipeline_parallel)
    model, folder = _first_to_be_had(candidates(settings.model, gpu_gib), settings.home_dir, report)
    return _resolved(settings, model, folder, on_gpu=gpu_gib is not None)


def locate(settings: Settings) -> ResolvedModel | None:
    """The model `resolve` would choose, if it is here already; never fetches.

    Raises:
        SetupError: it is unknown, or has less context than `settings.model_context` asks for.
    """
    gpu_gib = gpu_free_gib(settings.tensor_parallel * settings.pipeline_parallel)
    model = candidates(settings.model, gpu_gib)[0]
    folder = folder_of(model, settings.home_dir)
    return _resolved(settings, model, folder, on_gpu=gpu_gib is not None) if is_present(folder) else None


def candidates(name: str, gpu_gib: float | None) -> list[Model]:
    """The models `name` may mean, best first: several only for 'auto' on a GPU, where the hub may be out of reach."""
    if name != "auto":
        return [find(name)]
    fitting = [m for m in load_catalogue().values() if m.min_gpu_gib is not None and m.min_gpu_gib <= (gpu_gib or 0)]
    best = sorted(fitting, key=lambda model: model.min_gpu_gib or 0, reverse=True)[:1]
    return [*best, find(CPU_DEFAULT)]


def memory_gib(settings: Settings) -> float:
    """The RAM one replica of the model takes: measured, or the weights plus the process, and the KV cache on CPU."""
    gpu_gib = gpu_free_gib(settings.tensor_parallel * settings.pipeline_parallel)
    if gpu_gib is not None:
        return GPU_HOST_GIB
    model = candidates(settings.model, gpu_gib)[0]
    if model.memory_gib is not None:
        return model.memory_gib + settings.cpu_kv_cache_gib
    folder = folder_of(model, settings.home_dir)
    weights = folder.glob("*.safetensors") if folder.is_dir() else iter(())
    return PROCESS_GIB + sum(file.stat().st_size for file in weights) / GIB + settings.cpu_kv_cache_gib


def gpu_free_gib(gpus: int = 1) -> float | None:
    """The free memory of the first `gpus` GPUs together; None without a GPU or without a vLLM that uses it."""
    try:
        importlib.metadata.version("vllm")
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (importlib.metadata.PackageNotFoundError, OSError, subprocess.SubprocessError):
        return None
    free_mib = [float(line) for line in listing.split() if line.replace(".", "").isdigit()][:gpus]
    return min(free_mib) * len(free_mib) / 1024 if free_mib else None


def _first_to_be_had(models: list[Model], home: Path, report: Report) -> tuple[Model, Path]:
    for model in models[:-1]:
        try:
            return model, download(model, home, report)
        except NotReached:
            continue
    return models[-1], download(models[-1], home, report)


def _resolved(settings: Settings, model: Model, folder: Path, *, on_gpu: bool) -> ResolvedModel:
    own = _own_context(folder)
    wanted = settings.model_context
    if wanted is not None and own is not None and wanted > own:
        raise SetupError(
            f"ONEBOX_MODEL_CONTEXT={wanted} is more than model {model.alias!r} has: its context is {own} tokens. "
            f"Set it to at most {own}, or unset it."
        )
    if wanted is None and not on_gpu:
        return ResolvedModel(model.alias, str(folder), min(own or CPU_CONTEXT, CPU_CONTEXT))
    return ResolvedModel(model.alias, str(folder), wanted or own)


def _own_context(folder: Path) -> int | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(
            f"Model folder {str(folder)!r} cannot be used: its config.json does not read ({error}). "
            "Delete the folder and start again, or set ONEBOX_MODEL to another model."
        ) from error
    length = config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))
    return length if isinstance(length, int) else None
