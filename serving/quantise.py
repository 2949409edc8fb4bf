"""Weights rounded to INT8, in the layout that vLLM reads (compressed-tensors): half the memory traffic of bfloat16.

Rounding to nearest with one scale per output row, no calibration data; activations are rounded as they come, one scale
per token. It takes and writes folders of safetensors; how a GGUF becomes one is in `serving.gguf_convert`.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from onebox.errors import SetupError
from serving.models import ResolvedModel

LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOP = 127
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": [],
    "config_groups": {
        "group_0": {
            "targets": ["Linear", "re:.*lm_head"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def quantised(model: ResolvedModel, home: Path) -> ResolvedModel:
    """The same model with rounded weights, made at its first use and kept under `home`.

    Raises:
        SetupError: the model has no layers that can be rounded here.
    """
    source = Path(model.path)
    weights = sorted(source.glob("*.safetensors"))
    mark = hashlib.sha256(str([(str(file), file.stat().st_mtime_ns) for file in weights]).encode()).hexdigest()[:8]
    target = home / "models" / f"{model.alias}-int8-{mark}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        making = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            quantise(source, making)
            making.chmod(0o755)
            making.rename(target)
        except OSError:  # another replica was faster
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return replace(model, path=str(target))


def quantise(source: Path, target: Path) -> None:
    """Write the model of folder `source` into folder `target` with rounded weights.

    Raises:
        SetupError: it has no layers that can be rounded here.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in _read(source):
        if name.endswith(".weight") and name.split(".")[-2] in LAYERS:
            tensors |= _rounded(name, weight)
        else:
            tensors[name] = weight
    rounded = any(weight.dtype == torch.int8 for weight in tensors.values())
    if "quantization_config" in config or EMBEDDING not in tensors or not rounded or _has_experts(tensors):
        raise SetupError(
            f"Model {source.name!r} cannot be served in INT8: it is quantised already, or its layers are not those of "
            "a dense Llama or Qwen model. Unset ONEBOX_MODEL_QUANTIZATION."
        )
    tensors |= _rounded(HEAD, tensors.pop(HEAD, tensors[EMBEDDING]))
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy2(file, target / file.name)
    config |= {"tie_word_embeddings": False, "quantization_config": SCHEME}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors writes 0600, and the engine may run as another user


def _read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a mapping
                yield name, weights.get_tensor(name)


def _rounded(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / TOP
    return {name: (weight.float() / scale).round().to(torch.int8), f"{name}_scale": scale}


def _has_experts(tensors: dict[str, torch.Tensor]) -> bool:
    return any(".experts." in name for name in tensors)
