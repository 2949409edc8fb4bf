"""GGUF to the folder of safetensors, config and tokenizer that vLLM loads, in seconds.

It knows the two architectures of the catalogue (llama, qwen2) with a byte-level BPE vocabulary, and refuses the rest;
it is not a general converter. The slow twin it is tested against is `transformers` with `GgufConfig(dequantize=True)`.
"""

import importlib.metadata
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from onebox.errors import SetupError
from serving.progress import Report, quiet

# llama.cpp's `src/llama-vocab.cpp` names a vocabulary's split; these are the originals' own, from their tokenizer.json.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ROWS_AT_A_TIME = 16_384
CONTROL_TOKEN, USER_TOKEN, UNUSED_TOKEN = 3, 4, 5


@dataclass(frozen=True, slots=True)
class Header:
    """What the file says about the model; the names are those of a Hugging Face config."""

    architecture: str
    context: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    rope_theta: float
    rms_eps: float
    vocab_size: int
    tied: bool
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    split: str
    bos: int | None
    eos: int
    pad: int | None
    chat_template: str

    @property
    def stop_ids(self) -> list[int]:
        """The end of a turn, and the end of a text where the vocabulary has another token for it."""
        text_end = [i for i, token in enumerate(self.tokens) if token == "<|endoftext|>"]
        return [self.eos, *(i for i in text_end if i != self.eos)]


def convert(gguf_path: Path, out_dir: Path, report: Report = quiet) -> None:
    """Write the model in `gguf_path` to `out_dir` (made if missing) as bfloat16 safetensors with config and tokenizer.

    Raises:
        SetupError: the file is damaged, or of an architecture, vocabulary or tensor type this does not know.
    """
    try:
        reader = gguf.GGUFReader(gguf_path)
        header = _read_header(reader)
    except (ValueError, KeyError, IndexError) as error:
        raise SetupError(
            f"Model file {str(gguf_path)!r} cannot be read as GGUF: {error}. Delete it and fetch it again."
        ) from error
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_json(out_dir / "config.json", _config(header))
    _write_json(out_dir / "generation_config.json", _generation_config(header))
    _write_json(out_dir / "tokenizer_config.json", _tokenizer_config(header))
    _tokenizer(header).save(str(out_dir / "tokenizer.json"))
    weights = out_dir / "model.safetensors"
    save_file(_tensors(reader, header, report), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes 0600, and the engine may run as another user


def _read_header(reader: gguf.GGUFReader) -> Header:
    def value(key: str) -> object:
        return reader.fields[key].contents()

    def number(key: str) -> int:
        return int(reader.fields[key].contents())

    def decimal(key: str) -> float:
        return float(str(np.float32(reader.fields[key].contents())))

    def token_id(kind: str) -> int | None:
        key = f"tokenizer.ggml.{kind}_token_id"
        return number(key) if key in reader.fields else None

    arch = str(value("general.architecture"))
    vocabulary, split = str(value("tokenizer.ggml.model")), str(value("tokenizer.ggml.pre"))
    if arch not in ARCHITECTURES or vocabulary != "gpt2" or split not in ("smollm", "qwen2"):
        raise ValueError(
            f"its architecture {arch!r} with vocabulary {vocabulary!r}, {split!r} is none of "
            "llama or qwen2 with 'gpt2', 'smollm' or 'gpt2', 'qwen2'"
        )
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    return Header(
        architecture=arch,
        context=number(f"{arch}.context_length"),
        hidden=number(f"{arch}.embedding_length"),
        intermediate=number(f"{arch}.feed_forward_length"),
        layers=number(f"{arch}.block_count"),
        heads=number(f"{arch}.attention.head_count"),
        kv_heads=number(f"{arch}.attention.head_count_kv"),
        rope_theta=decimal(f"{arch}.rope.freq_base"),
        rms_eps=decimal(f"{arch}.attention.layer_norm_rms_epsilon"),
        vocab_size=shapes["token_embd.weight"][1],
        tied="output.weight" not in shapes,
        tokens=tuple(reader.fields["tokenizer.ggml.tokens"].contents()),
        token_types=tuple(reader.fields["tokenizer.ggml.token_type"].contents()),
        merges=tuple(reader.fields["tokenizer.ggml.merges"].contents()),
        split=split,
        bos=token_id("bos"),
        eos=number("tokenizer.ggml.eos_token_id"),
        pad=token_id("padding"),
        chat_template=str(value("tokenizer.chat_template")),
    )


def _config(header: Header) -> dict[str, object]:
    return {
        "architectures": [ARCHITECTURES[header.architecture]],
        "attention_bias": header.architecture == "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": header.bos,
        "dtype": "bfloat16",
        "eos_token_id": header.eos,
        "hidden_act": "silu",
        "hidden_size": header.hidden,
        "intermediate_size": header.intermediate,
        "max_position_embeddings": header.context,
        "model_type": header.architecture,
        "num_attention_heads": header.heads,
        "num_hidden_layers": header.layers,
        "num_key_value_heads": header.kv_heads,
        "pad_token_id": header.pad,
        "rms_norm_eps": header.rms_eps,
        "rope_parameters": {"rope_theta": header.rope_theta, "rope_type": "default"},
        "rope_theta": header.rope_theta,
        "tie_word_embeddings": header.tied,
        "transformers_version": importlib.metadata.version(
            "transformers"
        ),  # without it, it warns of a Mistral tokenizer
        "use_cache": True,
        "vocab_size": header.vocab_size,
    }


def _generation_config(header: Header) -> dict[str, object]:
    return {"bos_token_id": header.bos, "eos_token_id": header.stop_ids, "pad_token_id": header.pad}


def _tokenizer_config(header: Header) -> dict[str, object]:
    def text(token: int | None) -> str | None:
        return None if token is None else header.tokens[token]

    return {
        "add_bos_token": False,
        "bos_token": text(header.bos),
        "chat_template": header.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": text(header.eos),
        "model_max_length": header.context,
        "pad_token": text(header.pad),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _tokenizer(header: Header) -> Tokenizer:
    """The vocabulary as `tokenizers` wants it, without the rows that only pad the embedding to a round size."""
    typed = list(enumerate(zip(header.tokens, header.token_types, strict=True)))
    vocab = {token: i for i, (token, kind) in typed if kind != UNUSED_TOKEN}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in header.merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if header.split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
        then = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        first = pre_tokenizers.Digits(individual_digits=True)
        then = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, then])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for _, (token, kind) in typed if kind == CONTROL_TOKEN]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for _, (token, kind) in typed if kind == USER_TOKEN]
    )
    return tokenizer


def _tensors(reader: gguf.GGUFReader, header: Header, report: Report) -> dict[str, torch.Tensor]:
    """The weights under their Hugging Face names; in two threads, as numpy works without the interpreter lock."""
    total = sum(2 * int(tensor.n_elements) for tensor in reader.tensors)
    done = 0
    tensors: dict[str, torch.Tensor] = {}
    names = {tensor.name: _hf_name(tensor.name) for tensor in reader.tensors}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, weight in pool.map(lambda tensor: (tensor.name, _bfloat16(tensor)), reader.tensors):
            if header.architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
                weight = _undo_rotary_order(weight, header.heads if "attn_q" in name else header.kv_heads)
            tensors[names[name]] = weight
            done += 2 * weight.numel()
            report("convert", done, total)
    return tensors


def _hf_name(name: str) -> str:
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    head, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    if head != "blk" or part not in LAYER_NAMES:
        raise SetupError(
            f"Model file has a tensor {name!r} that no llama or qwen2 model has: it would be lost in the conversion. "
            "Use a safetensors folder of this model instead."
        )
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def _bfloat16(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """The tensor in row-major shape, dequantised some rows at a time so that float32 never holds a whole embedding."""
    shape = tuple(reversed([int(n) for n in tensor.shape]))
    weight = torch.empty(shape, dtype=torch.bfloat16)
    try:
        for rows in _row_slices(shape[0]):
            weight[rows] = torch.from_numpy(
                np.array(dequantize(tensor.data[rows], tensor.tensor_type), dtype=np.float32)
            )
    except NotImplementedError:
        raise SetupError(
            f"Model file stores {tensor.name!r} as {tensor.tensor_type.name}, a type that cannot be dequantised here. "
            "Use a safetensors folder of this model, or a GGUF of another quantisation."
        ) from None
    return weight


def _row_slices(rows: int) -> Iterator[slice]:
    return (slice(start, start + ROWS_AT_A_TIME) for start in range(0, rows, ROWS_AT_A_TIME))


def _undo_rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp pairs rotary dimensions as neighbours, Hugging Face as halves (`permute` in convert_hf_to_gguf.py)."""
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns).contiguous()


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
