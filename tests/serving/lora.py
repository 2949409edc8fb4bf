"""A small LoRA adapter in PEFT's layout, made without training: random weights that surely change a reply."""

import json
from pathlib import Path

RANK = 4
LAYER = "self_attn.o_proj"


def make_adapter(folder: Path, model: Path | None, *, seed: int = 1) -> Path:
    """An adapter in `folder` for the model in folder `model`; without a model one of no weights, to be named only."""
    import torch  # 2 s to import, and most test modules do not need it
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors: dict[str, torch.Tensor] = {}
    if model is not None:
        shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
        draw = torch.Generator().manual_seed(seed)
        for layer in range(shape["num_hidden_layers"]):
            name = f"base_model.model.model.layers.{layer}.{LAYER}"
            inputs, outputs = (RANK, shape["hidden_size"]), (shape["hidden_size"], RANK)
            tensors[f"{name}.lora_A.weight"] = torch.randn(inputs, generator=draw) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, generator=draw) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
