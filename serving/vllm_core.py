"""The drafter as vLLM's engine core loads it. Only that process imports this module, so it may import vLLM.

It is also the one place of ours in that process, and mends what is wrong there with drafts on CPU in vLLM 0.32.
"""

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler

from serving.drafting import Drafter


class CoreDrafter(Drafter):
    """vLLM's `custom_class` proposer."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        if current_platform.is_cpu():
            # Its CPU kernel fills a copy when the values are not int64, and leaves the temperature, top_p and top_k of
            # drafted tokens to whatever the memory held. `test_likeliest_token_of_a_drafted_text_…` fails without this.
            rejection_sampler.expand_batch_to_tokens = expand
        super().__init__(vllm_config)


def expand(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each row's value once for each of its drafted tokens; `replace_from` becomes `replace_to`."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(replaced, counts, output_size=num_tokens)
