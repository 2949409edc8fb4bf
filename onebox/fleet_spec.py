"""The fleet file: the models there are, how each is run, and which task asks which of them first.

Read by whatever starts engines and by the gateway, from the same file, so that both mean the same. Without a file there
is one model, which has no name of its own here. An example is `deploy/fleet.example.toml`, the page `docs/models.md`.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from onebox.errors import SetupError
from onebox.settings import Settings

SINGLE: Final = ""
DEFAULT: Final = "default"
ROUTER: Final = "router"
RESERVED: Final = ("auto", DEFAULT, ROUTER)

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
# What a model's table may say, and the setting that stands for it.
_KEYS: Final = {
    "model": "model",
    "replicas": "engine_replicas",
    "replicas_min": "engine_replicas_min",
    "replicas_max": "engine_replicas_max",
    "replicas_per_node": "engine_replicas_per_node",
    "tensor_parallel": "tensor_parallel",
    "pipeline_parallel": "pipeline_parallel",
    "context": "model_context",
    "cpu_threads": "cpu_threads",
    "kv_cache_gib": "cpu_kv_cache_gib",
}
_MORE_KEYS: Final = ("gpus", "url", "adapters", "settings")
# Settings that may differ from model to model; the ingress is one for all.
_PER_MODEL: Final = (
    "engine", "model", "adapters", "tensor_", "pipeline_", "gpu_", "cpu_", "prefix_", "speculat", "scripted_",
    "max_tokens_", "connect_", "first_token_", "stall_", "drain_",
)  # fmt: skip
_OF_THE_FLEET: Final = frozenset({"engine_url", "engine_port", "engine_ingress"})


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. `settings` are the fleet's with what the file says of this model; `engine_url` leads to it alone.

    `elsewhere`: another fleet serves it, at a URL that the file gives; nothing is started for it here.
    """

    name: str
    settings: Settings
    elsewhere: bool = False

    @property
    def application(self) -> str:
        """The name of its Serve application."""
        return f"onebox-{self.name}" if self.name else "onebox"

    @property
    def route_prefix(self) -> str:
        """Where the fleet's ingress has it."""
        return f"/m/{self.name}" if self.name else "/"

    @property
    def replicas_most(self) -> int:
        """The most replicas it may ever have."""
        return self.settings.replica_bounds[1]


@dataclass(frozen=True, slots=True)
class Target:
    """What a name that can be asked for stands for: a model, or an adapter of it."""

    model: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """Models by name, in the order of the file, and the names each task asks, the preferred one first."""

    models: Mapping[str, ModelSpec]
    tasks: Mapping[str, tuple[str, ...]]

    @property
    def several(self) -> bool:
        """Whether models have names: there is a fleet file."""
        return SINGLE not in self.models

    @property
    def here(self) -> list[ModelSpec]:
        """The models to start with this fleet."""
        return [model for model in self.models.values() if not model.elsewhere]

    @property
    def replicas_most(self) -> int:
        """The most replicas there may ever be here."""
        return sum(model.replicas_most for model in self.here)

    def targets(self) -> dict[str, Target]:
        """Everything that can be asked for by name; the one model without a name is `SINGLE`."""
        found = {name: Target(name) for name in self.models}
        for model in self.models.values():
            found |= {adapter: Target(model.name, adapter) for adapter in model.settings.adapters}
        return found

    def order(self, task: str | None) -> tuple[str, ...]:
        """The names to ask for a task, the preferred one first; None is for whatever is no task."""
        return self.tasks.get(task or DEFAULT) or self.tasks.get(DEFAULT) or tuple(self.models)

    def with_threads(self, cores: int) -> "FleetSpec":
        """The same with the cores of one machine divided among the replicas of all models that say nothing of it."""
        if not self.several:
            return self
        share = max(1, cores // max(1, self.replicas_most))
        shared = {
            name: replace(model, settings=model.settings.model_copy(update={"cpu_threads": share}))
            for name, model in self.models.items()
            if model.settings.cpu_threads is None
        }
        return replace(self, models={**self.models, **shared})


def read_fleet(settings: Settings) -> FleetSpec:
    """The models of the fleet file; the one of the settings where there is no file.

    Raises:
        SetupError: the file does not read, or says something that cannot be.
    """
    if settings.fleet_file is None:
        return FleetSpec({SINGLE: ModelSpec(SINGLE, settings)}, {})
    path = settings.fleet_file.expanduser()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SetupError(
            f"Fleet file {str(path)!r} cannot be read: {why}. Correct it, or unset ONEBOX_FLEET_FILE."
        ) from None
    return _Reader(path, settings).read(content)


def per_model(setting: str) -> bool:
    """Whether a setting may differ from model to model."""
    return setting.startswith(_PER_MODEL) and setting not in _OF_THE_FLEET


class _Reader:
    """Makes a `FleetSpec` of a file's content; every error names the place."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self._settings = settings

    def read(self, content: Mapping[str, Any]) -> FleetSpec:
        self._known("the file", content, ("models", "tasks"))
        tables = self._table("models", content.get("models", {}))
        if not tables:
            raise self._error("[models]", "there is no model", "Add a table such as [models.small]")
        models: dict[str, ModelSpec] = {}
        for name, table in tables.items():
            self._usable_name(f"[models.{name}]", name, ())
            settings = self._model(name, self._table(f"models.{name}", table))
            models[name] = ModelSpec(name, settings, elsewhere="url" in table)
        names = list(models)
        for name, model in models.items():
            for adapter in model.settings.adapters:
                self._usable_name(f"[models.{name}.adapters]", adapter, names)
                names.append(adapter)
        return FleetSpec(models, self._tasks(self._table("tasks", content.get("tasks", {})), names))

    def _model(self, name: str, table: Mapping[str, Any]) -> Settings:
        place = f"[models.{name}]"
        self._known(place, table, (*_KEYS, *_MORE_KEYS))
        values: dict[str, Any] = {_KEYS[key]: value for key, value in table.items() if key in _KEYS}
        more = self._table(f"models.{name}.settings", table.get("settings", {}))
        own = [setting for setting in Settings.model_fields if per_model(setting) and setting != "adapters"]
        self._known(f"[models.{name}.settings]", more, own)
        if twice := sorted(set(more) & set(values)):
            raise self._error(place, f"{twice[0]!r} is said twice", "Say it in one place")
        values |= more
        if "gpus" in table:
            values |= self._parallel(place, table["gpus"], values)
        adapters = self._table(f"models.{name}.adapters", table.get("adapters", {}))
        values["adapters"] = {key: self._folder(f"[models.{name}.adapters]", key, adapters[key]) for key in adapters}
        values["engine_url"] = table.get("url", f"{self._settings.engine_url.rstrip('/')}/m/{name}")
        try:
            return Settings.model_validate(self._settings.model_dump() | values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            setting = str(first["loc"][0])
            keys = {stands: key for key, stands in (_KEYS | {"url": "engine_url"}).items() if key in table}
            key = keys.get(setting, setting)
            raise self._error(
                place, f"{key} is not usable: {first['msg'].lower()} (got {first.get('input')!r})", "Correct it"
            ) from None

    def _parallel(self, place: str, gpus: object, values: Mapping[str, Any]) -> dict[str, int]:
        """`gpus` of a replica as tensor times pipeline parallelism."""
        stages = values.get("pipeline_parallel", 1)
        if not isinstance(gpus, int) or not isinstance(stages, int) or gpus < 1 or stages < 1 or gpus % stages:
            raise self._error(
                place, f"gpus = {gpus!r} cannot be divided among {stages!r} pipeline stage(s)", "Give a multiple"
            )
        tensor = gpus // stages
        if values.get("tensor_parallel", tensor) != tensor:
            raise self._error(
                place, f"gpus = {gpus} is not tensor_parallel times pipeline_parallel", "Leave one of them out"
            )
        return {"tensor_parallel": tensor}

    def _tasks(self, table: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        self._known("[tasks]", table, (*self._settings.plugins, DEFAULT, ROUTER), "task")
        orders: dict[str, tuple[str, ...]] = {}
        known = list(names)
        for task, given in table.items():
            order = (given,) if isinstance(given, str) else given
            if not isinstance(order, list | tuple) or not order or not all(isinstance(name, str) for name in order):
                raise self._error("[tasks]", f"{task} = {given!r} is no list of models", 'Write e.g. ["a", "b"]')
            for name in order:
                self._known(f"[tasks] {task}", (name,), known, "model")
            orders[task] = tuple(dict.fromkeys(order))
        return orders

    def _usable_name(self, place: str, name: str, taken: Iterable[str]) -> None:
        if not _NAME.fullmatch(name):
            raise self._error(
                place, f"{name!r} is no name", "Use small letters, digits, '.', '_' and '-', at most 63 of them"
            )
        if name in (*RESERVED, *self._settings.plugins):
            raise self._error(place, f"{name!r} has another meaning in a request's model", "Choose another name")
        if name in taken:
            raise self._error(place, f"{name!r} is the name of two things", "Choose another name")

    def _folder(self, place: str, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise self._error(place, f"{key} = {value!r} is no folder", "Write its path in quotes")
        return str((self._path.parent / Path(value).expanduser()).absolute())

    def _table(self, place: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._error(f"[{place}]", f"{value!r} is no table", f"Write [{place}] and its lines below")
        return value

    def _known(self, place: str, given: Iterable[str], known: Iterable[str], what: str = "key") -> None:
        names = list(known)
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                advice = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(map(repr, names))}"
                raise self._error(place, f"{what} {name!r} is unknown", advice)

    def _error(self, place: str, what: str, advice: str) -> SetupError:
        end = "" if advice.endswith("?") else "."
        return SetupError(f"Fleet file {str(self._path)!r}, {place}: {what}. {advice}{end}")
