"""One engine call as the wire has it: the request, and the frames and the end of its reply.

`agents.engine` sends and receives them; the replica's side is `serving.protocol`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import orjson

from onebox.errors import EngineFailed, from_code
from onebox.events import Alternative, FinishReason, Token
from onebox.messages import Message
from onebox.plugin import Sampling

AFFINITY_CHARS: Final = 2048


@dataclass(frozen=True, slots=True)
class Generation:
    """One engine call. `choice` constrains the reply to one of these texts; `adapter` is the LoRA adapter that speaks.

    `resume` has the tokens of the reply that are drawn already; they count towards `max_tokens`, and the frames begin
    after them. Calls of one `affinity` go to one replica, as far as its load allows; see `affinity_key`.
    """

    request_id: str
    messages: Sequence[Message]
    sampling: Sampling
    max_tokens: int
    choice: Sequence[str] | None = None
    cache_salt: str | None = None
    session: str | None = None
    adapter: str | None = None
    resume: Sequence[int] = ()
    affinity: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """The next piece of a reply. `tokens` only where log-probabilities were asked for."""

    text: str
    ids: tuple[int, ...]
    tokens: tuple[Token, ...] = ()

    @property
    def count(self) -> int:
        """How many tokens it has."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class End:
    """The reply is whole. `completion_tokens` counts all of it, on however many replicas it was drawn."""

    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int


def affinity_key(messages: Sequence[Message], tenant: str, conversation: str | None) -> str:
    """The same for calls that share a long prefix: those of a conversation, or of one prompt and one first message.

    The beginning of a message is enough: questions on one document differ at its end.
    """
    if conversation is not None:
        parts = [conversation]
    else:
        first = next((message.text for message in messages if message.role != "system"), "")
        systems = [message.text for message in messages if message.role == "system"]
        parts = [tenant, *systems, first[:AFFINITY_CHARS]]
    return blake2b("\n".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def encode(call: Generation, ids: Sequence[int], wire_id: str) -> bytes:
    """The request for what follows `ids`, as the body of `POST /v1/generate`."""
    sampling: dict[str, object] = {"max_tokens": call.max_tokens - len(ids)}
    drawn = call.sampling
    if drawn.temperature is not None:
        sampling["temperature"] = drawn.temperature
    if drawn.top_p is not None:
        sampling["top_p"] = drawn.top_p
    if drawn.seed is not None:
        sampling["seed"] = drawn.seed
    if drawn.stop:
        sampling["stop"] = drawn.stop
    if drawn.top_logprobs is not None:
        sampling["top_logprobs"] = drawn.top_logprobs
    body: dict[str, object] = {
        "request_id": wire_id,
        "messages": [{"role": message.role, "content": message.text} for message in call.messages],
        "sampling": sampling,
    }
    if ids:
        body["resume_token_ids"] = ids
    if call.choice is not None:
        body["structured"] = {"choice": list(call.choice)}
    if call.cache_salt is not None:
        body["cache_salt"] = call.cache_salt
    if call.session is not None:
        body["session"] = call.session
    if call.adapter is not None:
        body["adapter"] = call.adapter
    if call.traceparent is not None:
        body["traceparent"] = call.traceparent
    return orjson.dumps(body)


def decode(line: bytes) -> Frame | End:
    """What a line of the reply holds.

    Raises:
        OneboxError: the error it holds, or `EngineFailed` where it is none of these.
    """
    try:
        item = orjson.loads(line)
        if "text" in item:
            tokens = item.get("tokens")
            return Frame(item["text"], tuple(item["ids"]), tuple(map(_token, tokens)) if tokens else ())
        if "finish" in item:
            usage = item["usage"]
            return End(item["finish"], usage["prompt_tokens"], usage["completion_tokens"])
        error = item["error"]
        code, message = str(error["code"]), str(error["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as fault:
        raise EngineFailed("The engine sent a frame that is not of this wire's version. Update both sides.") from fault
    raise from_code(code, message)


def _token(item: Mapping[str, Any]) -> Token:
    top = tuple(Alternative(rival["text"], rival["id"], rival["logprob"]) for rival in item.get("top", ()))
    return Token(item["text"], item["id"], item["logprob"], top)
