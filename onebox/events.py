"""Events: the numbered entries of a run.

Deltas only, never cumulative text. A run ends with exactly one terminal event; an end of stream without
one is a failure. `encode` and `decode` are the only codec.
"""

from dataclasses import dataclass
from typing import Annotated, Final, Literal

import orjson
from pydantic import Field, TypeAdapter

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Alternative:
    """One rival token at a position, with its natural-log probability."""

    text: str
    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token. `logprob` is natural log; `top` has the likeliest rivals, best first."""

    text: str
    id: int
    logprob: float
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Cue:
    """A span of the user's text that spoke for the chosen task. Offsets count characters."""

    text: str
    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Accepted:
    """The turn is stored; work begins."""

    run_id: str
    conversation_id: str | None = None
    turn_id: str | None = None
    kind: Literal["accepted"] = "accepted"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan: its task, the words of the message that ask for it, and what it works on.

    `start` and `end` count characters of the message, -1 where no words of it ask for this step. The input is the
    message without the words of the other steps, or the reply of the step before.
    """

    task: str
    input: Literal["message", "previous"]
    words: str = ""
    start: int = -1
    end: int = -1


@dataclass(frozen=True, slots=True)
class Routed:
    """The router's decision. `probabilities` maps each task to a share of 1; `ms` is the time it took.

    `steps` describes a plan of more than one task, in the order of execution; `declined` says that the message asks for
    what cannot be done here.
    """

    task: str
    plan: tuple[str, ...]
    probabilities: dict[str, float]
    tier: Literal["explicit", "head", "engine", "default"]
    ms: float
    cues: tuple[Cue, ...] = ()
    ask: bool = False
    steps: tuple[Step, ...] = ()
    declined: bool = False
    kind: Literal["routed"] = "routed"


@dataclass(frozen=True, slots=True)
class Replanned:
    """A user has changed the plan while it was carried out; the steps before `index` were begun and stay."""

    index: int
    plan: tuple[str, ...]
    kind: Literal["replanned"] = "replanned"


@dataclass(frozen=True, slots=True)
class Queued:
    """The run waits for an engine: its place in the queue, and seconds until its turn where that can be told.

    Position 0 says that its turn has come. Waiting is no part of what a run did: one that is done again waits anew.
    """

    position: int
    wait_s: float | None = None
    kind: Literal["queued"] = "queued"


@dataclass(frozen=True, slots=True)
class StepStarted:
    """Step `index` (from 0) of the plan begins."""

    index: int
    task: str
    kind: Literal["step_started"] = "step_started"


@dataclass(frozen=True, slots=True)
class Progress:
    """Work that produces no reply text yet: `done` of `total` units; `label` is for people."""

    done: int
    total: int
    label: str
    kind: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of the reply. `tokens` only where log-probabilities were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()
    kind: Literal["text_delta"] = "text_delta"


@dataclass(frozen=True, slots=True)
class Output:
    """A boundary of the reply's text; OpenAI's Responses API has an event for each, so the log has one too."""

    stage: Literal["item_added", "part_added", "text_done", "part_done", "item_done"]
    kind: Literal["output"] = "output"


@dataclass(frozen=True, slots=True)
class Citation:
    """Where a claim comes from. Offsets count characters of the source."""

    source: str
    start: int
    end: int
    quote: str
    kind: Literal["citation"] = "citation"


@dataclass(frozen=True, slots=True)
class Check:
    """A test the plugin made of its own reply."""

    name: str
    passed: bool
    detail: str = ""
    kind: Literal["check"] = "check"


@dataclass(frozen=True, slots=True)
class StepDone:
    """Step `index` of the plan ended well. `finish` is its last engine call's reason."""

    index: int
    task: str
    finish: FinishReason = "stop"
    kind: Literal["step_done"] = "step_done"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all engine calls of the run, in the engine's own count."""

    prompt_tokens: int
    completion_tokens: int
    kind: Literal["usage"] = "usage"


@dataclass(frozen=True, slots=True)
class Completed:
    """Terminal: the reply is whole (or cut at `max_tokens`: finish 'length')."""

    finish: FinishReason = "stop"
    kind: Literal["completed"] = "completed"


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: the run broke off; text sent before stands and is kept. `retry_after_s`: when to try again."""

    code: str
    message: str
    retryable: bool
    retry_after_s: float | None = None
    param: str | None = None
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True, slots=True)
class Stopped:
    """Terminal, the receipt of a stop: `tokens` were generated, at most `not_generated` more would have been.

    `slot_freed_ms` is the time from the stop until the engine's own count no longer had the request; None where no
    request ran or the engine could not be asked.
    """

    tokens: int
    not_generated: int = 0
    slot_freed_ms: float | None = None
    kind: Literal["stopped"] = "stopped"


Terminal = Completed | Failed | Stopped
Event = (
    Accepted
    | Routed
    | Replanned
    | Queued
    | StepStarted
    | Progress
    | TextDelta
    | Output
    | Citation
    | Check
    | StepDone
    | Usage
    | Completed
    | Failed
    | Stopped
)

_CODEC: Final[TypeAdapter[Event]] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def encode(event: Event) -> bytes:
    """The event as one line of JSON."""
    if type(event) is TextDelta and not event.tokens:  # nearly all are: 0.7 µs instead of 1.2
        return b'{"text":%b,"tokens":[],"kind":"text_delta"}' % orjson.dumps(event.text)
    return _CODEC.dump_json(event)


def decode(data: bytes | str) -> Event:
    """The event in `data`. Raises `pydantic.ValidationError`."""
    return _CODEC.validate_json(data)


def is_terminal(event: Event) -> bool:
    """Whether the run ends with this event."""
    return isinstance(event, Completed | Failed | Stopped)
