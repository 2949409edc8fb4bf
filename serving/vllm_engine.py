"""vLLM as an engine: `AsyncLLM` in this process, its core in a child process.

This module and `serving.vllm_core`, which the core loads, are the only ones that import vllm.

The twin for tests and load is `serving.scripted_engine`. vLLM batches, schedules and detokenizes; this module renders
prompts, continues broken-off replies and maps vLLM's errors to ours. vLLM is imported inside functions: it and its
libraries read the process environment when they are imported, and `start` sets that first.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from logging import getLogger
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, generate_latest

from onebox.errors import BadRequest, EngineFailed, OneboxError, Overloaded, PromptTooLong, Unavailable
from onebox.events import FinishReason
from onebox.settings import Settings
from serving.adapters import Adapter, read_adapters, unknown_adapter
from serving.engine import Batch
from serving.models import ResolvedModel, resolve
from serving.protocol import (
    End,
    GenerateRequest,
    ModelCard,
    Structured,
    TokenizeReply,
    TokenizeRequest,
    WireMessage,
    WireSampling,
)
from serving.vllm_arguments import engine_arguments, prepare_environment
from serving.vllm_outputs import batches_of

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.tokenizers import TokenizerLike
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerFactory

LARGE_PROMPT_CHARS = 20_000
DEAD_RETRY_S = 5.0
KV_USE = "vllm:kv_cache_usage_perc"

_log = getLogger(__name__)


class VllmEngine:
    """Implements `serving.engine.Engine`; made by `start`."""

    def __init__(
        self, engine: "AsyncLLM", model: ResolvedModel, settings: Settings, adapters: Mapping[str, Adapter]
    ) -> None:
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
        self._adapters = _Adapters(engine, adapters)

    @classmethod
    async def start(cls, settings: Settings) -> "VllmEngine":
        """A loaded engine; takes half a minute on CPU.

        Raises:
            SetupError: the model or an adapter cannot be had.
        """
        adapters = read_adapters(settings.adapters)
        model = await asyncio.to_thread(resolve, settings)
        prepare_environment(settings, model)
        if settings.model_quantization == "int8":
            from serving.quantise import quantised  # torch, too, reads the environment when it is imported

            model = await asyncio.to_thread(quantised, model, settings.home_dir)
        engine = cls(await asyncio.to_thread(_load, settings, model, adapters), model, settings, adapters)
        await engine._warm_grammar()
        return engine

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
            adapters=self._adapters.names,
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
            adapter = None if request.adapter is None else await self._adapters.loaded(request.adapter)
            continuation = _Continuation(self._tokenizer, prompt, resumed, params) if resumed else None
            if continuation is not None and continuation.stopped:
                yield (End("stop", len(prompt), 0),)
                return
            outputs = self._engine.generate(
                _tokens_prompt(prompt + resumed, request.cache_salt),
                params,
                request.request_id,
                lora_request=adapter,
                priority=request.priority,
                session_id=request.session,
                trace_headers={"traceparent": request.traceparent} if request.traceparent else None,
            )
            async with aclosing(outputs):
                async for batch in batches_of(outputs, continuation, len(prompt), request.sampling.top_logprobs):
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

    def kv_use(self) -> float:
        """As vLLM's scheduler last counted it."""
        families = REGISTRY.restricted_registry([KV_USE]).collect()
        return max((sample.value for family in families for sample in family.samples), default=0.0)

    def metrics(self) -> bytes:
        """vLLM's own metrics (`vllm:*`)."""
        return generate_latest(REGISTRY)

    async def close(self) -> None:
        """Ends vLLM's core process."""
        await asyncio.to_thread(self._engine.shutdown)

    async def _warm_grammar(self) -> None:
        """A first structured reply, which sets up vLLM's grammar back end."""
        request = GenerateRequest(
            request_id="warm-grammar",
            prompt_token_ids=(1,),
            sampling=WireSampling(max_tokens=1, temperature=0),
            structured=Structured(choice=("a", "b")),
        )
        async with aclosing(self.generate(request)) as batches:
            async for _ in batches:
                pass

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


class _Adapters:
    """The adapters, each loaded by vLLM at its first use."""

    def __init__(self, engine: "AsyncLLM", adapters: Mapping[str, Adapter]) -> None:
        self._engine = engine
        self._adapters = adapters
        self._loaded: dict[str, LoRARequest] = {}
        self._loading = asyncio.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may ask for."""
        return tuple(self._adapters)

    async def loaded(self, name: str) -> "LoRARequest":
        """The adapter, ready for use.

        Raises:
            BadRequest: there is none of this name, or vLLM cannot use it with this model.
        """
        from vllm.lora.request import LoRARequest

        if name not in self._adapters:
            raise unknown_adapter(name, self.names)
        async with self._loading:
            if name not in self._loaded:
                request = LoRARequest(name, 1 + self.names.index(name), str(self._adapters[name].path))
                try:
                    # Of its own accord vLLM loads an adapter within a step, where a failure ends the engine.
                    await self._engine.add_lora(request)
                except Exception as error:
                    raise BadRequest(
                        f"Adapter {name!r} does not fit the model: {error}. Use one that was trained on this model.",
                        param="adapter",
                    ) from error
                self._loaded[name] = request
        return self._loaded[name]


def _load(settings: Settings, model: ResolvedModel, adapters: Mapping[str, Adapter]) -> "AsyncLLM":
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    on_cpu = current_platform.is_cpu()
    # Any, for vLLM checks each value by itself.
    arguments: dict[str, Any] = {**engine_arguments(settings, model, adapters, on_cpu=on_cpu)}
    if on_cpu:
        # vLLM would put the one worker into a process of its own: 17 s more to start, and at 1, 8 and 16 streams of
        # smollm2-135m 29, 200 and 323 tok/s instead of 43, 292 and 470. By name ("uni") it is not obeyed.
        arguments["distributed_executor_backend"] = UniProcExecutor
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=_stat_loggers(settings))


def _stat_loggers(settings: Settings) -> "list[StatLoggerFactory] | None":
    """What gets vLLM's statistics: Prometheus's registry of this process, and Ray's metrics port where it is wanted."""
    if not settings.ray_metrics:
        return None
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    # In this order: each takes vLLM's metrics off the process's registry before it puts its own somewhere.
    return [RayPrometheusStatLogger, PrometheusStatLogger]


def _tokens_prompt(ids: list[int], cache_salt: str | None) -> "TokensPrompt":
    from vllm.inputs import TokensPrompt

    prompt = TokensPrompt(prompt_token_ids=ids)
    if cache_salt is not None:
        prompt["cache_salt"] = cache_salt
    return prompt


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
