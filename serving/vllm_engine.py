"""vLLM as an engine: `AsyncLLM` in this process, its core in a child process. The only module that imports vllm.

The twin for tests and load is `serving.scripted_engine`. vLLM batches, schedules and detokenizes; this module renders
prompts, continues broken-off replies and maps vLLM's errors to ours. vLLM is imported inside functions: it and its
libraries read the process environment when they are imported, and `start` sets that first.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, generate_latest

from onebox.errors import BadRequest, EngineFailed, OneboxError, Overloaded, PromptTooLong, Unavailable
from onebox.events import Alternative, FinishReason, Token
from onebox.settings import Settings
from serving.engine import Batch
from serving.models import ResolvedModel, resolve
from serving.protocol import (
    End,
    Frame,
    GenerateRequest,
    ModelCard,
    Structured,
    TokenizeReply,
    TokenizeRequest,
    WireMessage,
)

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.logprobs import Logprob
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.tokenizers import TokenizerLike
    from vllm.v1.engine.async_llm import AsyncLLM

LARGE_PROMPT_CHARS = 20_000
GIB = 1024**3
DEAD_RETRY_S = 5.0

_log = getLogger(__name__)


class VllmEngine:
    """Implements `serving.engine.Engine`; made by `start`."""

    def __init__(self, engine: "AsyncLLM", model: ResolvedModel, settings: Settings) -> None:
        self._engine = engine
        self._tokenizer = engine.get_tokenizer()
        self._alias = model.alias
        self._context_length = int(engine.model_config.max_model_len)
        self._dtype = str(engine.model_config.dtype).removeprefix("torch.")
        # The model's own generation_config.json, as vLLM's API server applies it.
        self._defaults: dict[str, float] = {
            name: value
            for name, value in engine.model_config.get_diff_sampling_param().items()
            if name in {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
        }
        ends = engine.model_config.try_get_generation_config().get("eos_token_id", ())
        self._end_ids = {self._tokenizer.eos_token_id} | ({ends} if isinstance(ends, int) else set(ends))
        self._max_ongoing = settings.engine_max_ongoing
        self._max_queued = settings.engine_max_queued

    @classmethod
    async def start(cls, settings: Settings) -> "VllmEngine":
        """A loaded engine; takes half a minute on CPU.

        Raises:
            SetupError: the model cannot be had.
        """
        model = await asyncio.to_thread(resolve, settings)
        _prepare_environment(settings, model)
        return cls(await asyncio.to_thread(_load, settings, model), model, settings)

    def model_card(self) -> ModelCard:
        """What is served, as vLLM has loaded it."""
        return ModelCard(
            id=self._alias,
            engine="vllm",
            context_length=self._context_length,
            dtype=self._dtype,
            chat_template=self._has_template(),
            max_ongoing=self._max_ongoing,
            max_queued=self._max_queued,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Batch, None]:
        """The reply; closing it aborts the request in vLLM."""
        await self.check()
        prompt = list(request.prompt_token_ids or await self._render(request.messages or ()))
        resumed = list(request.resume_token_ids)
        room = self._context_length - len(prompt) - len(resumed)
        if finish := self._finish_of(request, len(prompt)):
            yield (End(finish, len(prompt), 0),)
            return
        if room < 1:
            raise PromptTooLong(
                f"The prompt has {len(prompt) + len(resumed)} tokens and the context holds {self._context_length}: "
                "no room is left for a reply. Shorten the conversation or the text."
            )
        try:
            params = self._sampling_params(request, room)
            continuation = _Continuation(self._tokenizer, prompt, resumed, params) if resumed else None
            if continuation is not None and continuation.stopped:
                yield (End("stop", len(prompt), 0),)
                return
            outputs = self._engine.generate(
                _tokens_prompt(prompt + resumed, request.cache_salt),
                params,
                request.request_id,
                priority=request.priority,
                session_id=request.session,
            )
            async with aclosing(outputs):
                async for batch in _batches(outputs, continuation, len(prompt), request.sampling.top_logprobs):
                    yield batch
                    if isinstance(batch[-1], End):
                        return
        except OneboxError:
            raise
        except Exception as error:
            raise _mapped(error) from error

    async def settle(self) -> None:
        """A round trip to vLLM's core, which takes what it is sent in order: the aborts before it are done."""
        await self._engine.is_sleeping()

    def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        """Ids and pieces in the model's own tokens."""
        if (request.messages is None) == (request.text is None):
            raise BadRequest("Give exactly one of 'messages' and 'text'.")
        if request.text is not None:
            ids = self._tokenizer.encode(request.text, add_special_tokens=False)
        else:
            ids = self._apply_template(request.messages or ())
        return TokenizeReply(count=len(ids), ids=tuple(ids), pieces=tuple(self._tokenizer.decode([i]) for i in ids))

    async def check(self) -> None:
        """Raises `Unavailable` once vLLM's core has died."""
        if self._engine.errored:
            raise Unavailable("The engine is dead. It is restarted; try again shortly.", retry_after_s=DEAD_RETRY_S)

    def metrics(self) -> bytes:
        """vLLM's own metrics (`vllm:*`)."""
        return generate_latest(REGISTRY)

    async def close(self) -> None:
        """Ends vLLM's core process."""
        await asyncio.to_thread(self._engine.shutdown)

    async def _render(self, messages: tuple[WireMessage, ...]) -> list[int]:
        if sum(len(message.content) for message in messages) < LARGE_PROMPT_CHARS:
            return self._apply_template(messages)
        return await asyncio.to_thread(self._apply_template, messages)

    def _apply_template(self, messages: tuple[WireMessage, ...]) -> list[int]:
        if not self._has_template():
            raise BadRequest(
                f"Model {self._alias!r} has no chat template, so messages cannot be rendered. "
                "Send 'prompt_token_ids', or serve an instruct model."
            )
        conversation: list[Any] = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids = self._tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # templates raise whatever their author chose, jinja2's errors among them
            raise BadRequest(
                f"The model's chat template refuses these messages: {error}. Check the order of the roles."
            ) from error
        return [int(token) for token in ids]

    def _finish_of(self, request: GenerateRequest, prompt_tokens: int) -> FinishReason | None:
        """How the resumed tokens end the reply, where they are all of it."""
        resumed, wanted = request.resume_token_ids, request.structured
        if not resumed:
            return None
        if resumed[-1] in self._end_ids and not request.sampling.ignore_eos:
            return "stop"
        options = wanted.choice if wanted is not None else None
        if options and self._tokenizer.decode(list(resumed), skip_special_tokens=True) in options:
            return "stop"
        if prompt_tokens < self._context_length <= prompt_tokens + len(resumed):
            return "length"
        return None

    def _has_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def _sampling_params(self, request: GenerateRequest, room: int) -> "SamplingParams":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        asked = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        drawing: dict[str, Any] = self._defaults | {name: value for name, value in asked.items() if value is not None}
        return SamplingParams(
            max_tokens=min(sampling.max_tokens, room),
            seed=sampling.seed,
            stop=list(sampling.stop),
            logprobs=sampling.top_logprobs,
            ignore_eos=sampling.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=self._structured(request.structured, request.resume_token_ids),
            **drawing,
        )

    def _structured(self, wanted: Structured | None, resumed: Sequence[int]) -> "StructuredOutputsParams | None":
        from vllm.sampling_params import StructuredOutputsParams

        if wanted is None:
            return None
        if wanted.choice is None:
            if resumed:
                raise BadRequest("A reply bound to a JSON schema cannot be continued. Ask for the whole reply again.")
            return StructuredOutputsParams(json=wanted.json_schema)
        said = self._tokenizer.decode(list(resumed), skip_special_tokens=True)
        rests = [option.removeprefix(said) for option in wanted.choice if option.startswith(said)]
        if not all(rests) or not rests:
            raise BadRequest(f"None of the choices goes on from {said!r}. Ask for the whole reply again.")
        return StructuredOutputsParams(choice=rests)


class _Continuation:
    """The text of a continued reply, joined byte for byte to what was sent before.

    vLLM takes the resumed tokens for part of the prompt and so loses a character cut in two and the text held back
    for stop strings. This runs vLLM's own detokenizer as if the reply had never broken off.
    """

    def __init__(
        self, tokenizer: "TokenizerLike", prompt: list[int], resumed: list[int], params: "SamplingParams"
    ) -> None:
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        original = EngineCoreRequest(
            request_id="continuation",
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, original)
        self.stopped = self._detokenizer.update(resumed, stop_terminated=False) is not None
        self._detokenizer.get_next_output_text(finished=False, delta=True)

    def advance(self, ids: Sequence[int], reason: str | None, stop_reason: int | str | None) -> tuple[str, bool]:
        """The text that `ids` add, and whether a stop string ends the reply here."""
        by_token = reason == "stop" and not isinstance(stop_reason, str)
        stopped = self._detokenizer.update(list(ids), stop_terminated=by_token) is not None
        text: str = self._detokenizer.get_next_output_text(finished=stopped or reason is not None, delta=True)
        return text, stopped


def _prepare_environment(settings: Settings, model: ResolvedModel) -> None:
    """What vLLM takes from the process environment alone; its core process inherits it."""
    local = Path(model.path).is_dir()
    threads = settings.cpu_threads or max(1, (os.cpu_count() or 1) // settings.engine_replicas)
    os.environ |= {
        # Replicas share the cores; vLLM's own binding would give each of them the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Ray sets 1 for an actor of one CPU.
        "OMP_NUM_THREADS": str(threads),
        # Threads spin briefly at their barriers, then sleep. On an idle machine (2 cores, smollm2-135m; 1, 8, 16)
        # streams, 20,000 turns give 44, 300, 482 tok/s, as does the default of 300,000; 1,000 turns 34, 252, 417, and
        # OMP_WAIT_POLICY=PASSIVE 28, 220, 378. Long spinning starves the other processes of a busy machine.
        "GOMP_SPINCOUNT": "20000",
        # A fork of a process with Ray's and torch's threads may deadlock.
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": settings.log_level.upper(),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if local:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _load(settings: Settings, model: ResolvedModel) -> "AsyncLLM":
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(_engine_args(settings, model))


def _engine_args(settings: Settings, model: ResolvedModel) -> "AsyncEngineArgs":
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    common: dict[str, object] = {
        "model": model.path,
        "served_model_name": model.alias,
        "max_model_len": model.context_length,
        "max_num_seqs": settings.engine_max_ongoing,
        "enable_prefix_caching": settings.prefix_caching,
        "scheduling_policy": "priority",
        "enable_log_requests": False,
    }
    if current_platform.is_cpu():
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        cpu = {
            # vLLM would put the one worker into a process of its own: 17 s more to start, and at 1, 8 and 16 streams of
            # smollm2-135m 29, 200 and 323 tok/s instead of 43, 292 and 470. By name ("uni") it is not obeyed.
            "distributed_executor_backend": UniProcExecutor,
            "dtype": "bfloat16" if settings.model_dtype == "auto" else settings.model_dtype,
            # Compiling took 197 s at start and changed greedy answers; eager 30 s and none.
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(settings.cpu_kv_cache_gib * GIB),
        }
        return AsyncEngineArgs(**common, **cpu)
    gpu = {
        "dtype": settings.model_dtype,
        "gpu_memory_utilization": settings.gpu_memory_fraction,
        "tensor_parallel_size": settings.tensor_parallel,
        # The replica's placement group has a bundle per GPU; Ray's executor puts a worker in each.
        "distributed_executor_backend": "ray" if settings.tensor_parallel > 1 else None,
    }
    return AsyncEngineArgs(**common, **gpu)


async def _batches(
    outputs: "AsyncGenerator[RequestOutput, None]",
    continuation: _Continuation | None,
    prompt_tokens: int,
    rivals: int | None,
) -> AsyncGenerator[Batch, None]:
    drawn = 0
    async for output in outputs:
        (choice,) = output.outputs
        ids = tuple(choice.token_ids)
        drawn += len(ids)
        text, reason = choice.text, choice.finish_reason
        if continuation is not None:
            text, stopped = continuation.advance(ids, reason, choice.stop_reason)
            reason = "stop" if stopped else reason
        # FlatLogprobs come only where flat_logprobs is asked for.
        tokens = _tokens(ids, choice.logprobs, rivals or 0)  # pyright: ignore[reportArgumentType]
        frame = Frame(text, ids, tokens)
        if reason is not None:
            yield frame, End(_finish(reason), prompt_tokens, drawn)
            return
        if ids:
            yield (frame,)


def _tokens_prompt(ids: list[int], cache_salt: str | None) -> "TokensPrompt":
    from vllm.inputs import TokensPrompt

    prompt = TokensPrompt(prompt_token_ids=ids)
    if cache_salt is not None:
        prompt["cache_salt"] = cache_salt
    return prompt


def _finish(reason: str) -> FinishReason:
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise EngineFailed("The engine broke off the reply. Try again.")


def _tokens(ids: Sequence[int], logprobs: "Sequence[Mapping[int, Logprob]] | None", rivals: int) -> tuple[Token, ...]:
    if logprobs is None:
        return ()
    return tuple(_token(token, position, rivals) for token, position in zip(ids, logprobs, strict=True))


def _token(drawn: int, position: "Mapping[int, Logprob]", rivals: int) -> Token:
    """`position` has the drawn token and the likeliest ones, which it may be one of; vLLM ranks from 1."""
    likeliest = sorted(position.items(), key=lambda item: item[1].rank or 0)[:rivals]
    top = tuple(Alternative(rival.decoded_token or "", token, rival.logprob) for token, rival in likeliest)
    return Token(position[drawn].decoded_token or "", drawn, position[drawn].logprob, top)


def _mapped(error: Exception) -> OneboxError:
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError):
        return Unavailable("The engine is dead. It is restarted; try again shortly.", retry_after_s=DEAD_RETRY_S)
    if isinstance(error, GracefulHTTPError):
        return Overloaded("The engine's queue is full. Try again shortly.", retry_after_s=1.0)
    if isinstance(error, VLLMClientError | ValueError):
        return BadRequest(f"vLLM refuses the request: {error}. Correct it.")
    _log.exception("generation failed", exc_info=error)
    return EngineFailed("The engine broke off the reply. Its log says more. Try again.")
