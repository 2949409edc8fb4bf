"""vLLM's outputs as the wire's frames. The engine itself is `serving.vllm_engine`; no vLLM is imported to run this."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from onebox.errors import EngineFailed
from onebox.events import Alternative, FinishReason, Token
from serving.engine import Batch
from serving.protocol import End, Frame

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.logprobs import Logprob


class Continuation(Protocol):
    """The text of a continued reply."""

    def advance(self, ids: Sequence[int], reason: str | None, stop_reason: int | str | None) -> tuple[str, bool]:
        """The text that `ids` add, and whether a stop string ends the reply here."""
        ...


async def batches_of(
    outputs: "AsyncGenerator[RequestOutput, None]",
    continuation: Continuation | None,
    prompt_tokens: int,
    rivals: int | None,
) -> AsyncGenerator[Batch, None]:
    """A frame for each output that has tokens, and the end with the last; `rivals` for each token where given.

    Raises:
        EngineFailed: vLLM broke off the reply.
    """
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
