"""Which model a machine serves, from its setting, its GPU and what is on the disk."""

import json
import re
from pathlib import Path

import pytest

from onebox.errors import SetupError
from onebox.settings import Settings
from serving import models
from serving.catalogue import Model, find, load_catalogue
from serving.download import NotReached
from serving.models import ResolvedModel, candidates, gpu_free_gib, locate, memory_gib, resolve
from serving.progress import Report


@pytest.fixture(autouse=True)
def _without_gpu_and_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "gpu_free_gib", lambda gpus: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def _settings(home: Path, **values: object) -> Settings:
    return Settings.model_validate({"home": home, **values})


def _store(folder: Path, context: int = 32768) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
    (folder / "model.safetensors").write_bytes(bytes(1024))
    return folder


def test_every_catalogue_entry_says_where_it_is_and_under_which_licence() -> None:
    for alias, model in load_catalogue().items():
        assert model.alias == alias
        assert model.licence
        assert model.languages
        assert model.disk_gib
        assert model.memory_gib
        assert model.hub is not None
        for checksum in (*(wheel.sha256 for wheel in model.wheels), *([model.gguf_sha256] if model.wheels else [])):
            assert re.fullmatch("[0-9a-f]{64}", checksum)


def test_a_cached_model_is_resolved_without_network(tmp_path: Path) -> None:
    folder = _store(tmp_path / "models" / "smollm2-135m", context=8192)
    resolved = resolve(_settings(tmp_path, model="smollm2-135m"))
    assert resolved == ResolvedModel("smollm2-135m", str(folder), 8192)


def test_auto_without_a_gpu_is_the_small_bilingual_model(tmp_path: Path) -> None:
    folder = _store(tmp_path / "models" / "qwen2.5-coder-0.5b")
    assert resolve(_settings(tmp_path)) == ResolvedModel("qwen2.5-coder-0.5b", str(folder), 8192)


def test_a_local_folder_is_served_where_it_is(tmp_path: Path) -> None:
    folder = _store(tmp_path / "mine", context=2048)
    assert resolve(_settings(tmp_path, model=str(folder))) == ResolvedModel("mine", str(folder), 2048)


def test_a_hub_id_is_looked_for_under_its_own_folder(tmp_path: Path) -> None:
    folder = _store(tmp_path / "models" / "org--name")
    assert resolve(_settings(tmp_path, model="org/name")).path == str(folder)


def test_a_missing_model_that_cannot_be_fetched_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(model: Model, home: Path, report: Report) -> Path:
        raise NotReached("Model 'smollm2-135m' could not be fetched: no network. Connect to one.")

    monkeypatch.setattr(models, "download", unreachable)
    with pytest.raises(SetupError, match="Connect to one"):
        resolve(_settings(tmp_path, model="smollm2-135m"))


@pytest.mark.parametrize("name", ["smollm-135m", "smollm2-135", "no-such-folder/", "../x/y/z", ""])
def test_an_unknown_model_names_the_known_ones(tmp_path: Path, name: str) -> None:
    if name == "":
        with pytest.raises(SetupError):
            resolve(_settings(tmp_path, model=name))
        return
    with pytest.raises(SetupError, match=r"'smollm2-135m', 'qwen2\.5-coder-0\.5b'"):
        resolve(_settings(tmp_path, model=name))


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(SetupError, match="Did you mean 'smollm2-135m'"):
        find("smollm-135m")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError, match=r"no config\.json"):
        find(str(tmp_path / "empty"))


def test_a_config_that_does_not_read_is_refused(tmp_path: Path) -> None:
    (_store(tmp_path / "mine") / "config.json").write_text("{")
    with pytest.raises(SetupError, match=r"config\.json does not read"):
        resolve(_settings(tmp_path, model=str(tmp_path / "mine")))


def test_more_context_than_the_model_has_is_refused(tmp_path: Path) -> None:
    _store(tmp_path / "mine", context=2048)
    with pytest.raises(SetupError, match="at most 2048"):
        resolve(_settings(tmp_path, model=str(tmp_path / "mine"), model_context=4096))


def test_the_context_asked_for_is_given(tmp_path: Path) -> None:
    _store(tmp_path / "mine", context=32768)
    assert resolve(_settings(tmp_path, model=str(tmp_path / "mine"), model_context=16384)).context_length == 16384


def test_on_a_gpu_the_model_keeps_its_own_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "gpu_free_gib", lambda gpus: 80.0)
    _store(tmp_path / "mine", context=32768)
    assert resolve(_settings(tmp_path, model=str(tmp_path / "mine"))).context_length == 32768


@pytest.mark.parametrize(
    ("gpu_gib", "aliases"),
    [
        (None, ["qwen2.5-coder-0.5b"]),
        (4.0, ["qwen2.5-coder-0.5b"]),
        (8.0, ["qwen2.5-1.5b", "qwen2.5-coder-0.5b"]),
        (23.5, ["qwen3-4b", "qwen2.5-coder-0.5b"]),
        (47.0, ["qwen3-30b-a3b-fp8", "qwen2.5-coder-0.5b"]),
        (79.0, ["qwen3-30b-a3b", "qwen2.5-coder-0.5b"]),
    ],
)
def test_auto_takes_the_largest_model_that_fits_the_gpu(gpu_gib: float | None, aliases: list[str]) -> None:
    assert [model.alias for model in candidates("auto", gpu_gib)] == aliases


def test_auto_on_a_gpu_falls_back_where_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_wheels(model: Model, home: Path, report: Report) -> Path:
        if not model.wheels:
            raise NotReached("The hub does not answer.")
        return _store(home / "models" / model.alias)

    monkeypatch.setattr(models, "gpu_free_gib", lambda gpus: 80.0)
    monkeypatch.setattr(models, "download", only_wheels)
    assert resolve(_settings(tmp_path)).alias == "qwen2.5-coder-0.5b"


def test_locate_finds_and_never_fetches(tmp_path: Path) -> None:
    assert locate(_settings(tmp_path, model="smollm2-135m")) is None
    assert list(tmp_path.iterdir()) == []
    folder = _store(tmp_path / "models" / "smollm2-135m", context=8192)
    assert locate(_settings(tmp_path, model="smollm2-135m")) == ResolvedModel("smollm2-135m", str(folder), 8192)


def test_memory_counts_the_cache_and_the_weights(tmp_path: Path) -> None:
    small = memory_gib(_settings(tmp_path, model="smollm2-135m", cpu_kv_cache_gib=1))
    assert memory_gib(_settings(tmp_path, model="smollm2-135m", cpu_kv_cache_gib=3)) == pytest.approx(small + 2)
    assert memory_gib(_settings(tmp_path, model="qwen2.5-coder-0.5b", cpu_kv_cache_gib=1)) > small
    folder = _store(tmp_path / "mine")
    light = memory_gib(_settings(tmp_path, model=str(folder)))
    with (folder / "more.safetensors").open("wb") as weights:
        weights.truncate(2 * 1024**3)
    assert memory_gib(_settings(tmp_path, model=str(folder))) == pytest.approx(light + 2)


def test_gpu_memory_is_the_least_free_one_times_the_gpus_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '81920\\n40960\\n81920\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "0.33")
    assert gpu_free_gib(1) == 80
    assert gpu_free_gib(2) == 80


def test_a_gpu_is_of_no_use_to_the_cpu_build_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_cpu(name: str) -> str:
        raise models.importlib.metadata.PackageNotFoundError(name)

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81920\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(models.importlib.metadata, "version", only_cpu)
    assert gpu_free_gib() is None
