"""The reader as a torch module; for training only.

What is trained are the upper layers and the answers. The lower layers stay as they are, so what they make of a text is
worked out once.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from agents.reader.encoding import LENGTH
from agents.reader.plans import ANSWERS, COLUMNS, COUNT, POOL_OF, POOLS
from agents.reader.source import EPSILON, HEADS, WIDTH, Source

LAYERS: Final = 8
FROZEN: Final = 2
PAD: Final = 1
DROPOUT: Final = 0.1


def pad(texts: Sequence[torch.Tensor], filler: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of different lengths (pieces, or a row of numbers for each) side by side, and where there is something."""
    sizes = torch.tensor([len(text) for text in texts])
    padded = nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=filler)
    return padded, (torch.arange(padded.shape[1])[None] < sizes[:, None]).to(padded.device)


def _linear(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device="cpu")  # nothing is drawn
    made.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return made


class Layer(nn.Module):
    """One layer of a transformer encoder, normalised after each half (Devlin et al. 2019)."""

    def __init__(self, source: Source, number: int) -> None:
        super().__init__()
        self.mix, self.out, self.first, self.second = (_linear(*one) for one in source.matrices(number).values())
        self.norms = nn.ParameterList(torch.tensor(norm) for norm in source.norms(number))

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The state of each piece after this layer."""
        size, length, _ = x.shape
        query, key, value = self.mix(x).view(size, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        heard = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None, :])
        heard = self.out(heard.transpose(1, 2).reshape(size, length, WIDTH))
        norms = self.norms
        x = F.layer_norm(x + F.dropout(heard, DROPOUT, self.training), (WIDTH,), norms[0], norms[1], EPSILON)
        said = self.second(F.gelu(self.first(x), approximate="tanh"))
        return F.layer_norm(x + F.dropout(said, DROPOUT, self.training), (WIDTH,), norms[2], norms[3], EPSILON)


class Net(nn.Module):
    """Pieces to answers: weighted means of the last states, one for each step and one for what cannot be done."""

    middle: torch.Tensor
    spread: torch.Tensor
    pool_of: torch.Tensor

    def __init__(self, source: Source, device: str = "cpu") -> None:
        super().__init__()
        self._source = source
        self._places = torch.tensor(source.floats("emb.pos", LENGTH, WIDTH) + source.floats("emb.type", WIDTH))
        self._norm = [torch.tensor(source.floats(f"emb.ln.{part}", WIDTH)) for part in ("w", "b")]
        self._lower = [Layer(source, number).requires_grad_(False).eval() for number in range(FROZEN)]
        self.layers = nn.ModuleDict({str(number): Layer(source, number) for number in range(FROZEN, LAYERS)})
        self.weigh = nn.Linear(WIDTH, POOLS, bias=False)
        self.answers = nn.Linear(WIDTH, ANSWERS)
        self.second = nn.Parameter(torch.zeros(COUNT, COUNT + 1))
        self.third = nn.Parameter(torch.zeros(2, COUNT, COUNT + 1))
        self.register_buffer("middle", torch.zeros(WIDTH))
        self.register_buffer("spread", torch.ones(WIDTH))
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.answers.bias)
        nn.init.normal_(self.answers.weight, std=0.02)
        self.register_buffer("pool_of", torch.from_numpy(POOL_OF))
        self.to(device)
        self._lower = [layer.to(device) for layer in self._lower]
        self._places, self._norm = self._places.to(device), [part.to(device) for part in self._norm]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.middle.device

    def heads(self) -> list[nn.Parameter]:
        """What is learned from nothing."""
        return [*self.weigh.parameters(), *self.answers.parameters(), self.second, self.third]

    @torch.no_grad()
    def lower(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The state of each piece after the layers that are not trained. `ids` are in the main memory."""
        known, where = np.unique(ids.numpy(), return_inverse=True)
        words = torch.from_numpy(self._source.rows(known))[torch.from_numpy(where.reshape(ids.shape))].to(self.device)
        x = F.layer_norm(words + self._places[: ids.shape[1]], (WIDTH,), self._norm[0], self._norm[1], EPSILON)
        real = real.to(self.device)
        for layer in self._lower:
            x = layer(x, real)
        return x

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The scores of each text, `ANSWERS` numbers, from what `lower` made of it."""
        return self.answer(self.pooled(x, real))

    def pooled(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The weighted means of the last states, one for each of `POOLS`, each number with the spread of 1."""
        for layer in self.layers.values():
            x = layer(x, real)
        x = (x - self.middle) / self.spread
        shares = self.weigh(x).masked_fill(~real[..., None], -1e9).softmax(1)
        return torch.einsum("btw,btp->bpw", x, shares)

    def answer(self, means: torch.Tensor) -> torch.Tensor:
        """The scores of texts by their means."""
        means = F.dropout(means, DROPOUT, self.training)
        return torch.einsum("baw,aw->ba", means[:, self.pool_of], self.answers.weight) + self.answers.bias

    @torch.no_grad()
    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """All that is learned, by name, for states as they are."""
        kept: dict[str, torch.Tensor] = dict(self.named_parameters())
        kept["weigh.weight"] = self.weigh.weight / self.spread
        kept["answers.weight"] = self.answers.weight / self.spread
        kept["answers.bias"] = self.answers.bias - kept["answers.weight"] @ self.middle
        return {name: value.detach().cpu().numpy() for name, value in kept.items()}

    def slots(self, scores: torch.Tensor, plans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The scores of each slot where the steps before it are those of `plans`."""
        first, second = plans[:, 0], plans[:, 1].clamp(max=COUNT - 1)
        return (
            scores[:, COLUMNS[0]],
            scores[:, COLUMNS[1]] + self.second[first],
            scores[:, COLUMNS[2]] + self.third[0][first] + self.third[1][second],
        )
