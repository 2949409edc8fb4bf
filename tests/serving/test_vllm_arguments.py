"""What vLLM is started with, and which adapters are refused before it is."""

import json
from pathlib import Path

import pytest

from onebox.errors import SetupError
from onebox.settings import Settings
from serving.adapters import read_adapters
from serving.models import ResolvedModel
from serving.vllm_arguments import engine_arguments
from tests.serving.lora import make_adapter


@pytest.fixture
def model(tmp_path: Path) -> ResolvedModel:
    folder = tmp_path / "model"
    folder.mkdir()
    return ResolvedModel("tiny", str(folder), 2048)


@pytest.mark.parametrize(
    ("speculation", "on_cpu", "drafted"),
    [("auto", True, True), ("auto", False, False), ("on", False, True), ("off", True, False)],
)
def test_tokens_are_drafted_on_cpu_unless_the_settings_say_otherwise(
    model: ResolvedModel, speculation: str, on_cpu: bool, drafted: bool
) -> None:
    settings = Settings.model_validate({"speculation": speculation})
    assert ("speculative_config" in engine_arguments(settings, model, {}, on_cpu=on_cpu)) is drafted


def test_model_that_draws_with_min_p_is_served_without_drafts(model: ResolvedModel) -> None:
    (Path(model.path) / "generation_config.json").write_text(json.dumps({"min_p": 0.1}))
    settings = Settings.model_validate({"speculation": "on"})
    assert "speculative_config" not in engine_arguments(settings, model, {}, on_cpu=True)


def test_last_place_for_adapters_stays_empty_and_a_batch_of_longest_drafts_fits(
    model: ResolvedModel, tmp_path: Path
) -> None:
    adapters = read_adapters({name: str(make_adapter(tmp_path / name, None)) for name in ("a", "b")})
    settings = Settings.model_validate({"engine_max_ongoing": 256, "speculation_tokens": 16})
    arguments = engine_arguments(settings, model, adapters, on_cpu=True)
    assert arguments["max_loras"] == 3
    assert arguments["max_lora_rank"] == 8
    assert arguments["lora_target_modules"] == ["o_proj"]
    assert arguments["max_num_batched_tokens"] == 256 * 17


@pytest.mark.parametrize("name", ["a/b", "", "-x", "a b"])
def test_adapter_whose_name_could_not_be_asked_for_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SetupError, match="ONEBOX_ADAPTERS"):
        read_adapters({name: str(make_adapter(tmp_path / "a", None))})


@pytest.mark.parametrize("defect", ["no folder", "no weights", "no config", "not LoRA", "rank"])
def test_folder_that_is_no_adapter_is_refused_with_its_name(tmp_path: Path, defect: str) -> None:
    folder = make_adapter(tmp_path / "a", None)
    config = json.loads((folder / "adapter_config.json").read_text())
    if defect == "no folder":
        folder = tmp_path / "b"
    elif defect == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif defect == "no config":
        (folder / "adapter_config.json").unlink()
    else:
        config |= {"peft_type": "IA3"} if defect == "not LoRA" else {"r": 1024}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError, match="poet"):
        read_adapters({"poet": str(folder)})
