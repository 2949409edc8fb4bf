"""How large the numbers get that a layer's matrices are multiplied with, found by reading some messages.

A few of them are a hundred times as large as the others. Rounded to eight bits beside these, the others would be lost;
so each is divided by what it reaches, and its row of the matrix multiplied by it (Xiao et al. 2023, SmoothQuant).
torch is needed here and nowhere at run time.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from agents.reader.net import Net
from agents.reader.train import Example, scores


def ranges(net: Net, some: Sequence[Example]) -> dict[str, NDArray[np.float32]]:
    """The largest absolute value of each input of each matrix, by the matrix's name with `.range`."""
    found: dict[str, torch.Tensor] = {}

    def look(name: str, _: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        here = given[0].detach().abs().flatten(0, -2).amax(0)
        found[name] = torch.maximum(found[name], here) if name in found else here

    layers = [*net._lower, *net.layers.values()]
    hooks = [
        module.register_forward_pre_hook(partial(look, f"layers.{number}.{name}.range"))
        for number, layer in enumerate(layers)
        for name, module in layer.named_children()
        if isinstance(module, torch.nn.Linear)
    ]
    scores(net.eval(), [Example(one.ids, one.plan, one.unsupported) for one in some])
    for hook in hooks:
        hook.remove()
    return {name: value.cpu().numpy() for name, value in found.items()}
