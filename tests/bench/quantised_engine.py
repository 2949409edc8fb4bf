"""`python -m tests.bench.quantised_engine FOLDER REPLIES`: one model's speed and quality, as JSON on the last line.

REPLIES is a file: where it is missing, this model's own greedy replies are written to it; where it is there, the model
is asked at each token of those replies whether it would have drawn the same.
"""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.decoding_tasks import KINDS, asks, facts
from tests.bench.real_model import VLLM_ENV

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.logprobs import Logprob

ENVIRONMENT = VLLM_ENV | {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
STREAMS = (1, 4, 16)
SPEED_TOKENS = 32
EACH_KIND = 3
REPLY_TOKENS = 160
TEXTS = ("README.md", "README.zh-CN.md")
TEXT_TOKENS = 1000
WORK = [(kind, index, text) for kind in KINDS for index, text in enumerate(asks(kind, EACH_KIND))]


def main() -> None:
    """Measure and print."""
    os.environ |= ENVIRONMENT  # vLLM and torch read it when they are imported
    from vllm import LLM

    llm = LLM(sys.argv[1], max_model_len=4096, enforce_eager=True, dtype="bfloat16", max_num_seqs=max(STREAMS))
    result = {f"tokens_per_s_{streams}": _speed(llm, streams) for streams in STREAMS}
    prompts = [_prompt(llm, text) for _, _, text in WORK]
    replies = _generate(llm, prompts, REPLY_TOKENS)
    said = [llm.get_tokenizer().decode(reply) for reply in replies]
    held = [facts(index, kind, text) for (kind, index, _), text in zip(WORK, said, strict=True) if kind.grounded]
    kept = Path(sys.argv[2])
    if not kept.exists():
        kept.write_text(json.dumps(replies))
    result |= {
        "facts": statistics.fmean(held),
        "agreement": _agreement(llm, prompts, json.loads(kept.read_text())),
        **{f"perplexity_{name}": _perplexity(llm, Path(name).read_text(encoding="utf-8")) for name in TEXTS},
    }
    print(json.dumps(result))


def _speed(llm: "LLM", streams: int) -> float:
    """Tokens per second once the prompts are cached."""
    prompts = [_prompt(llm, text) for text in asks(KINDS[-1], streams)]
    _generate(llm, prompts, 1)
    started = time.perf_counter()
    replies = _generate(llm, prompts, SPEED_TOKENS, ignore_eos=True)
    return sum(map(len, replies)) / (time.perf_counter() - started)


def _agreement(llm: "LLM", prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> float:
    """The share of the replies' tokens that this model finds likeliest, each after the tokens before it."""
    same = [
        position[token].rank == 1
        for prompt, reply in zip(prompts, replies, strict=True)
        for token, position in zip(reply, _logprobs(llm, prompt + reply)[len(prompt) :], strict=True)
    ]
    return statistics.fmean(same)


def _perplexity(llm: "LLM", text: str) -> float:
    ids = llm.get_tokenizer().encode(text)[:TEXT_TOKENS]
    chosen = [position[token].logprob for token, position in zip(ids[1:], _logprobs(llm, ids)[1:], strict=True)]
    return math.exp(-statistics.fmean(chosen))


def _prompt(llm: "LLM", text: str) -> list[int]:
    ids = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [int(token) for token in ids]


def _generate(llm: "LLM", prompts: Sequence[list[int]], tokens: int, *, ignore_eos: bool = False) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=ignore_eos)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _logprobs(llm: "LLM", ids: list[int]) -> "list[dict[int, Logprob]]":
    """For each token, its log-probability and the likeliest one's; nothing for the first."""
    from vllm import SamplingParams

    (output,) = llm.generate(
        [{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False
    )
    return [position or {} for position in output.prompt_logprobs]


if __name__ == "__main__":
    main()
