"""Request bodies of the public API. Replies are built by the handlers; values inside the gateway are dataclasses."""

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from agents.conversations import Feedback, Mode
from agents.run_store import TurnRequest
from onebox.errors import BadRequest
from onebox.messages import Message, Role
from onebox.plugin import Sampling
from onebox.settings import Settings

LOGPROBS: Final = "message.output_text.logprobs"
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _not_null(value: str) -> str:
    if "\x00" in value:
        raise ValueError("must not contain the NUL character")
    return value


def _neutral(value: object) -> object:
    if value in (None, [], 0, 0.0, {"type": "text"}):
        return value
    raise ValueError("is not supported by this server; leave it out")


def _plain_text(value: object) -> object:
    if value in (None, {}) or (isinstance(value, dict) and value.get("format") in (None, {"type": "text"})):
        return value
    raise ValueError("asks for a format other than text, which is not supported by this server; leave it out")


Text = Annotated[str, AfterValidator(_not_null)]
Identifier = Annotated[Text, Field(min_length=1, max_length=128)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


Plan = Annotated[list[Identifier], Field(max_length=16)]
Unsupported = Annotated[Any, AfterValidator(_neutral)]


class Body(BaseModel):
    """Frozen; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(frozen=True)

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """A message in OpenAI's shape."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def value(self) -> Message:
        """The message as the gateway knows it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message(_ROLES[self.role], text)


class Drawing(BaseModel):
    """How the reply is drawn; the part that chat and tasks share."""

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False

    def sampling(self, settings: Settings, top_logprobs: int | None = None) -> Sampling:
        """The sampling of the run.

        Raises:
            BadRequest: more tokens are asked for than the cap.
        """
        max_tokens = self.max_completion_tokens or self.max_tokens
        check_max_tokens(max_tokens, settings, "max_tokens")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(max_tokens, self.temperature, self.top_p, self.seed, stop, top_logprobs)


class StreamOptions(BaseModel):
    """OpenAI's stream options."""

    include_usage: bool | None = False


class OneboxOptions(Body):
    """What this server knows beyond OpenAI's API."""

    conversation: Identifier | None = None
    regenerate: bool = False
    edit: Identifier | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    plan: Plan = []
    events: bool = False
    background: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "OneboxOptions":
        if self.conversation is None and (self.regenerate or self.edit):
            raise ValueError("regenerate and edit need a conversation")
        if self.regenerate and self.edit:
            raise ValueError("give one of regenerate and edit")
        return self


class ChatRequest(Drawing):
    """`POST /v1/chat/completions`. Fields of OpenAI's API that change nothing here are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: Text = "auto"
    messages: list[ChatMessage]
    n: int | None = Field(1, ge=1, le=4)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None
    onebox: OneboxOptions = OneboxOptions()
    tools: Unsupported = None
    functions: Unsupported = None
    response_format: Unsupported = None
    presence_penalty: Unsupported = None
    frequency_penalty: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if (self.n or 1) > 1 and (self.stream or self.onebox.conversation):
            raise ValueError("n above 1 is for replies without stream and conversation")
        return self


class InputPart(BaseModel):
    """A part of an input message's content; what came as output may go back in."""

    model_config = ConfigDict(frozen=True)

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(BaseModel):
    """An item of a response's input."""

    model_config = ConfigDict(frozen=True)

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[InputPart]

    def value(self) -> Message:
        """The message as the gateway knows it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message(_ROLES[self.role], text)


def _as_items(value: object) -> object:
    """A text is one user message; as a union with a list its errors would name the wrong one of the two."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value else []
    return value


class ConversationReference(BaseModel):
    """A conversation by its id, as OpenAI writes it."""

    model_config = ConfigDict(frozen=True)

    id: Identifier


class ResponseOptions(Body):
    """What this server knows beyond OpenAI's Responses API."""

    regenerate: bool = False
    edit: Identifier | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    plan: Plan = []


class ResponseRequest(BaseModel):
    """`POST /v1/responses`. Fields of OpenAI's API that change nothing here are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: Text = "auto"
    input: Annotated[list[InputMessage], BeforeValidator(_as_items)] = Field(default_factory=list)
    instructions: Text | None = None
    stream: bool | None = False
    background: bool | None = False
    previous_response_id: Identifier | None = None
    conversation: Identifier | ConversationReference | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: Annotated[list[Text], Field(max_length=16)] | None = None
    metadata: Annotated[dict[Text, Text], Field(max_length=16)] | None = None
    store: bool | None = True
    onebox: ResponseOptions = ResponseOptions()
    tools: Unsupported = None
    prompt: Unsupported = None
    text: Annotated[Any, AfterValidator(_plain_text)] = None

    @property
    def conversation_id(self) -> str | None:
        """The conversation's id, however it was written."""
        given = self.conversation
        return given.id if isinstance(given, ConversationReference) else given

    @property
    def messages(self) -> tuple[Message, ...]:
        """The input as values."""
        return tuple(item.value() for item in self.input)

    def sampling(self, settings: Settings) -> Sampling:
        """The sampling of the run.

        Raises:
            BadRequest: more tokens are asked for than the cap.
        """
        check_max_tokens(self.max_output_tokens, settings, "max_output_tokens")
        wanted = LOGPROBS in (self.include or ())
        rivals = (self.top_logprobs or 0) if wanted else None
        return Sampling(self.max_output_tokens, self.temperature, self.top_p, self.seed, (), rivals)

    @model_validator(mode="after")
    def _consistent(self) -> "ResponseRequest":
        options = self.onebox
        if self.conversation is None and (options.regenerate or options.edit):
            raise ValueError("regenerate and edit need a conversation")
        if options.regenerate and options.edit:
            raise ValueError("give one of regenerate and edit")
        if self.conversation is not None and self.previous_response_id is not None:
            raise ValueError("give one of conversation and previous_response_id")
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise ValueError(f"top_logprobs needs include: [{LOGPROBS!r}]")
        return self


class TaskRequest(Drawing):
    """`POST /v1/tasks/{name}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Text | None = None
    messages: list[ChatMessage] | None = None
    params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_input(self) -> "TaskRequest":
        return _exactly_one(self)


class RouteRequest(Body):
    """`POST /v1/route`."""

    text: Text | None = None
    messages: list[ChatMessage] | None = None

    @model_validator(mode="after")
    def _one_input(self) -> "RouteRequest":
        return _exactly_one(self)


class PlanRequest(Body):
    """`PUT /v1/responses/{id}/plan`: the tasks of the plan, in order."""

    plan: Plan


class ConversationRequest(Body):
    """`POST /v1/conversations`."""

    title: Annotated[Text, Field(max_length=200)] = ""


class RenameRequest(Body):
    """`PATCH /v1/conversations/{id}`."""

    title: Annotated[Text, Field(min_length=1, max_length=200)]


class FeedbackRequest(Body):
    """`POST /v1/feedback`; `value` null takes it back."""

    conversation: Identifier
    run_id: Identifier
    value: Feedback | None


def turn_of(
    conversation: str | None, options: OneboxOptions | ResponseOptions, messages: tuple[Message, ...]
) -> TurnRequest | None:
    """The turn of the conversation that a request asks for; None where it names no conversation."""
    if conversation is None:
        return None
    mode: Mode = "regenerate" if options.regenerate else "edit" if options.edit else "new"
    return TurnRequest(mode, messages[-1].text if messages else "", options.edit)


def check_max_tokens(max_tokens: int | None, settings: Settings, param: str) -> None:
    """Return when the reply may be that long.

    Raises:
        BadRequest: more tokens are asked for than the cap.
    """
    if max_tokens is not None and max_tokens > settings.max_tokens_cap:
        raise BadRequest(
            f"{param} {max_tokens} exceeds this server's cap of {settings.max_tokens_cap}. Ask for less.", param=param
        )


def read_messages(
    messages: list[ChatMessage], settings: Settings, *, ends_with_user: bool = True
) -> tuple[Message, ...]:
    """The messages of a request as values.

    Raises:
        BadRequest: none, too many, or the last is no question.
    """
    values = tuple(message.value() for message in messages)
    check_messages(values, settings, "messages", ends_with_user=ends_with_user)
    return values


def check_messages(
    messages: tuple[Message, ...], settings: Settings, param: str, *, ends_with_user: bool = True
) -> None:
    """Return when the messages can be answered.

    Raises:
        BadRequest: none, too many, or the last is no question.
    """
    if not messages:
        raise BadRequest(f"{param} is empty: there is nothing to answer. Send at least one user message.", param=param)
    if len(messages) > settings.messages_max:
        raise BadRequest(
            f"{param} has {len(messages)} entries, the limit is {settings.messages_max}. Shorten the history.",
            param=param,
        )
    last = messages[-1]
    if ends_with_user and (last.role != "user" or not last.text.strip()):
        raise BadRequest("The last message must be the user's and not blank: it is what gets answered.", param=param)


_Input = TypeVar("_Input", "TaskRequest", "RouteRequest")


def _exactly_one(request: _Input) -> _Input:
    if (request.text is None) == (request.messages is None):
        raise ValueError("give exactly one of text and messages")
    return request
