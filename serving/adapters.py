"""LoRA adapters of the settings: names that requests give, and the folders in PEFT's layout that hold them.

Only their `adapter_config.json` is read here; the weights are the engine's, which loads them at first use.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onebox.errors import BadRequest, SetupError

WEIGHTS = "adapter_model.safetensors"
RANK_MAX = 512  # vLLM's
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter; `modules` are the ends of the names of the layers it changes."""

    name: str
    path: Path
    rank: int
    modules: tuple[str, ...]


def read_adapters(folders: Mapping[str, str]) -> dict[str, Adapter]:
    """The adapters by name, in the settings' order.

    Raises:
        SetupError: a name is no plain word, or a folder is not a LoRA adapter.
    """
    return {name: _read(name, Path(folder).expanduser()) for name, folder in folders.items()}


def unknown_adapter(name: str, known: Sequence[str]) -> BadRequest:
    """The error for a request that names an adapter which is not served."""
    names = ", ".join(map(repr, known)) or "none"
    return BadRequest(
        f"Adapter {name!r} is not served by this engine; it has: {names}. Choose one of these, or add it to "
        "ONEBOX_ADAPTERS.",
        param="adapter",
    )


def _read(name: str, path: Path) -> Adapter:
    if not NAME.fullmatch(name):
        raise SetupError(
            f"Adapter name {name!r} in ONEBOX_ADAPTERS cannot be used: it becomes part of a model's name. "
            "Use letters, digits, '.', '_' and '-', beginning with a letter or digit."
        )
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        rank, modules = config["r"], config["target_modules"]
        if not (path / WEIGHTS).is_file():
            raise ValueError(f"there is no {WEIGHTS}")
        if config.get("peft_type", "LORA") != "LORA" or not 0 < rank <= RANK_MAX:
            raise ValueError(f"it is no LoRA adapter of a rank up to {RANK_MAX}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(
            f"Adapter {name!r} in ONEBOX_ADAPTERS cannot be used: {str(path)!r} is not a folder of a LoRA adapter "
            f"({error}). Give a folder with adapter_config.json and {WEIGHTS}, as PEFT saves it."
        ) from None
    return Adapter(name, path, rank, (modules,) if isinstance(modules, str) else tuple(modules))
