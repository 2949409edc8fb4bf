"""The engine wire, version 1: what a gateway sends to a replica and what comes back.

`POST /v1/generate` takes a `GenerateRequest` as JSON and answers `application/x-ndjson`: `Frame` lines, the first
flushed at once, then exactly one `End` or `Error` line. Nothing leaves, not even the status line, before the engine
has its first output: overload, a prompt too long or a dead engine are plain HTTP errors with an `{"error": ...}` body.
Closing the connection aborts the request; `POST /v1/abort` does so too, and says when the engine has let go of it.

Every answer names the replica in `x-onebox-replica`, the address of its own door: the same routes without the fleet's
ingress in between. `GET /v1/fleet` lists the doors of all replicas with their load (`serving.roster`); a gateway that
asks says with `?queued=` how many runs wait there for a place, so that the fleet grows by them. A generation
may name its affinity key in `x-onebox-affinity`, and requests of one key find their prefix cached where the first of
them went. With `x-onebox-if-free` it is refused (429) where it would have to wait, for another replica may have a
place. Every route wants `Authorization: Bearer <internal token>`.

This is not the public API; that is `agents.api`. The gateway's side of the wire is `agents.engine`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator

from onebox.events import FinishReason, Token

VERSION = 1
CONTENT_TYPE = "application/x-ndjson"
REPLICA_HEADER = "x-onebox-replica"
AFFINITY_HEADER = "x-onebox-affinity"
FREE_HEADER = "x-onebox-if-free"


class WireModel(BaseModel):
    """Frozen; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WireMessage(WireModel):
    """One message for the model's chat template."""

    role: Literal["system", "user", "assistant"]
    content: str


class WireSampling(WireModel):
    """How tokens are drawn; `max_tokens` counts from the end of `resume_token_ids`."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    ignore_eos: bool = False


class Structured(WireModel):
    """Constrains the reply to one of `choice`, or to a JSON text that fits `json_schema`."""

    choice: tuple[str, ...] | None = Field(default=None, min_length=1)
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "Structured":
        if (self.choice is None) == (self.json_schema is None):
            raise ValueError("give exactly one of choice and json_schema")
        return self


class GenerateRequest(WireModel):
    """One generation. Exactly one of `messages` and `prompt_token_ids` is given.

    `resume_token_ids` continues a reply: those tokens were generated before and are not sent again. Where they are the
    whole reply, its `End` is all that comes. `adapter` names a LoRA adapter of the model card;
    `traceparent` is the span that the engine's own belong to.
    """

    request_id: str = Field(min_length=1, max_length=128)
    messages: tuple[WireMessage, ...] | None = Field(default=None, min_length=1)
    prompt_token_ids: tuple[int, ...] | None = Field(default=None, min_length=1)
    resume_token_ids: tuple[int, ...] = ()
    sampling: WireSampling
    structured: Structured | None = None
    cache_salt: str | None = None
    session: str | None = None
    priority: int = 0
    adapter: str | None = None
    traceparent: str | None = None

    @model_validator(mode="after")
    def _exactly_one_prompt(self) -> "GenerateRequest":
        if (self.messages is None) == (self.prompt_token_ids is None):
            raise ValueError("give exactly one of messages and prompt_token_ids")
        return self


class AbortRequest(WireModel):
    """Ends the replies of this request at this replica; their streams end with an `Error` of code `conflict`."""

    request_id: str = Field(min_length=1, max_length=128)


class AbortReply(WireModel):
    """What became of it: the tokens these replies had sent, the resumed ones not among them.

    `freed_ms` is the time until the engine itself was rid of them; None where it took longer than the replica waits.
    """

    found: bool
    completion_tokens: int
    freed_ms: float | None


class TokenizeRequest(WireModel):
    """Counts either a rendered chat prompt or a bare text."""

    messages: tuple[WireMessage, ...] | None = None
    text: str | None = None


class TokenizeReply(WireModel):
    """`pieces[i]` is the text of `ids[i]`; pieces of a split character are shown as U+FFFD."""

    count: int
    ids: tuple[int, ...]
    pieces: tuple[str, ...]


class ModelCard(WireModel):
    """`GET /v1/model`. Lengths in tokens; `tokens_per_s` is the canary's last measured speed, one stream."""

    id: str
    engine: Literal["vllm", "scripted"]
    context_length: int
    dtype: str
    chat_template: bool
    max_ongoing: int
    max_queued: int
    adapters: tuple[str, ...] = ()
    tokens_per_s: float | None = None
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Frame:
    """The next tokens of the reply. `tokens` only where `top_logprobs` was given."""

    text: str
    ids: tuple[int, ...]
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """The reply is whole. `completion_tokens` counts this call's own, not the resumed ones."""

    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Error:
    """The reply broke off. `code` is that of an `onebox.errors` class."""

    code: str
    message: str
    retryable: bool


def encode_line(item: Frame | End | Error) -> bytes:
    """The item as one NDJSON line: `{"text", "ids", "tokens"?}`, `{"finish", "usage"}` or `{"error"}`."""
    if isinstance(item, Frame):
        line: dict[str, object] = {"text": item.text, "ids": item.ids}
        if item.tokens:
            line["tokens"] = item.tokens
    elif isinstance(item, End):
        line = {
            "finish": item.finish,
            "usage": {"prompt_tokens": item.prompt_tokens, "completion_tokens": item.completion_tokens},
        }
    else:
        line = {"error": {"code": item.code, "message": item.message, "retryable": item.retryable}}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
