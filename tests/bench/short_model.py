"""A model with few layers, for measurements in which all but decoding shows."""

import re
from pathlib import Path
from typing import Final

import orjson
import torch
from safetensors.torch import load_file, save_file

INDEX: Final = "model.safetensors.index.json"
LAYER: Final = re.compile(r"\.layers\.(\d+)\.")


def shortened(folder: Path, layers: int, target: Path) -> Path:
    """A copy of a model with its first layers only: it speaks nonsense, fast, so that all else shows."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix not in (".safetensors", ".gguf") and file.name not in ("config.json", INDEX):
            (target / file.name).symlink_to(file.resolve())
    config = orjson.loads((folder / "config.json").read_bytes())
    (target / "config.json").write_bytes(orjson.dumps(config | {"num_hidden_layers": layers}))
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            number = LAYER.search(name)
            if number is None or int(number[1]) < layers:
                weights[name] = tensor
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
