"""Rounding to INT8, on weights small enough to look at; its cost is measured by `tests.bench.quantised`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebox.errors import SetupError
from serving.models import ResolvedModel
from serving.quantise import quantise, quantised

PROJECTION = "model.layers.0.self_attn.q_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        EMBEDDING: torch.randn((40, 16), generator=draw).to(torch.bfloat16),
        PROJECTION: (torch.randn((8, 16), generator=draw) * torch.arange(1, 9).unsqueeze(1)).to(torch.bfloat16),
        BIAS: torch.randn((8,), generator=draw).to(torch.bfloat16),
    }


def folder_of(path: Path, weights: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": True, **config}))
    (path / "tokenizer.json").write_text("{}")
    save_file(weights, path / "model.safetensors")
    return path


def test_each_row_is_rounded_to_half_a_step_of_its_own(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    target = tmp_path / "int8"
    target.mkdir()
    quantise(folder_of(tmp_path / "model", weights), target)
    rounded = load_file(target / "model.safetensors")
    scale = rounded[f"{PROJECTION}_scale"]
    error = rounded[PROJECTION].float() * scale - weights[PROJECTION].float()
    assert rounded[PROJECTION].dtype == torch.int8
    assert (error.abs() <= scale / 2 * 1.01).all()
    assert torch.equal(rounded[BIAS], weights[BIAS])
    assert torch.equal(rounded[EMBEDDING], weights[EMBEDDING])


def test_output_head_that_shared_the_embedding_gets_rounded_weights_of_its_own(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    target = tmp_path / "int8"
    target.mkdir()
    quantise(folder_of(tmp_path / "model", weights), target)
    rounded = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    head = rounded["lm_head.weight"].float() * rounded["lm_head.weight_scale"]
    assert torch.allclose(head, weights[EMBEDDING].float(), atol=0.05)
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (target / "tokenizer.json").is_file()


def test_rounded_model_is_made_once_and_again_when_the_weights_change(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    source = folder_of(tmp_path / "model", weights)
    model = ResolvedModel("tiny", str(source), 64)
    first = quantised(model, tmp_path)
    made = (Path(first.path) / "model.safetensors").stat().st_mtime_ns
    assert quantised(model, tmp_path) == first
    assert (Path(first.path) / "model.safetensors").stat().st_mtime_ns == made
    save_file({name: weight * 2 for name, weight in weights.items()}, source / "model.safetensors")
    assert quantised(model, tmp_path).path != first.path
    assert first.context_length == 64
    assert not [entry for entry in (tmp_path / "models").iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("defect", ["quantised", "experts", "unknown layers"])
def test_model_that_cannot_be_rounded_here_is_refused(
    tmp_path: Path, weights: dict[str, torch.Tensor], defect: str
) -> None:
    config = {"quantization_config": {}} if defect == "quantised" else {}
    if defect == "experts":
        weights["model.layers.0.mlp.experts.0.up_proj.weight"] = weights[PROJECTION].clone()
    if defect == "unknown layers":
        weights["model.layers.0.attn.qkv.weight"] = weights.pop(PROJECTION)
    source = folder_of(tmp_path / "model", weights, **config)
    with pytest.raises(SetupError, match="INT8"):
        quantised(ResolvedModel("tiny", str(source), 64), tmp_path)
    assert list((tmp_path / "models").iterdir()) == []
