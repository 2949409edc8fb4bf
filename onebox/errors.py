"""Every error a user or client can meet.

    OneboxError
    ├── BadRequest                 400 invalid_request
    │   ├── PromptTooLong          400 context_length_exceeded
    │   ├── BodyTooLarge           413 body_too_large
    │   └── IdempotencyMismatch    422 idempotency_mismatch
    ├── Unauthorized               401 invalid_api_key
    ├── Forbidden                  403 forbidden
    ├── NotFound                   404 not_found
    │   ├── UnknownModel           404 model_not_found
    │   ├── UnknownTask            404 task_not_found
    │   ├── UnknownConversation    404 conversation_not_found
    │   └── UnknownRun             404 response_not_found
    ├── Conflict                   409 conflict
    ├── Overloaded                 429 overloaded           (retryable)
    │   └── RateLimited            429 rate_limited         (retryable)
    ├── Unavailable                503 unavailable          (retryable)
    │   ├── ModelLoading           503 model_loading        (retryable)
    │   └── StoreUnavailable       503 store_unavailable    (retryable)
    ├── EngineFailed               502 engine_failed        (retryable)
    ├── Timeout                    504 timeout              (retryable)
    ├── PluginFailed               500 plugin_failed
    ├── Internal                   500 internal_error
    └── SetupError                 (launcher only; exit code 1)

A message has three parts: what went wrong, why, and what to do about it.
"""

from typing import ClassVar


class OneboxError(Exception):
    """Base of all: `code` and `status` are the class's, `retry_after_s` the instance's."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", *, retry_after_s: float | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = param


class BadRequest(OneboxError):
    """The request cannot be understood or breaks a limit; sending it again will not help."""

    code = "invalid_request"
    status = 400


class PromptTooLong(BadRequest):
    """Prompt and room for the reply exceed the model's context; the message has both counts."""

    code = "context_length_exceeded"


class BodyTooLarge(BadRequest):
    """The request body exceeds its limit."""

    code = "body_too_large"
    status = 413


class IdempotencyMismatch(BadRequest):
    """The idempotency key was used before with another request."""

    code = "idempotency_mismatch"
    status = 422


class Unauthorized(OneboxError):
    """No key, or an unknown one."""

    code = "invalid_api_key"
    status = 401


class Forbidden(OneboxError):
    """The key is known and may not do this."""

    code = "forbidden"
    status = 403


class NotFound(OneboxError):
    """Nothing has this name or id."""

    code = "not_found"
    status = 404


class UnknownModel(NotFound):
    """The `model` of a request is neither 'auto', a task nor an engine's model."""

    code = "model_not_found"


class UnknownTask(NotFound):
    """No plugin of this name is installed."""

    code = "task_not_found"


class UnknownConversation(NotFound):
    """This tenant has no such conversation."""

    code = "conversation_not_found"


class UnknownRun(NotFound):
    """This tenant has no such run, or its log's time is over."""

    code = "response_not_found"


class Conflict(OneboxError):
    """The thing is busy or changed under the caller."""

    code = "conflict"
    status = 409


class Overloaded(OneboxError):
    """Capacity and queue are full; come back after `retry_after_s`."""

    code = "overloaded"
    status = 429
    retryable = True


class RateLimited(Overloaded):
    """This tenant has as much going on as one tenant may; others are served."""

    code = "rate_limited"


class Unavailable(OneboxError):
    """A part that is needed is not there at the moment."""

    code = "unavailable"
    status = 503
    retryable = True


class ModelLoading(Unavailable):
    """The engine is starting."""

    code = "model_loading"


class StoreUnavailable(Unavailable):
    """The Redis store does not answer."""

    code = "store_unavailable"


class EngineFailed(OneboxError):
    """The engine broke off a reply that had begun, or answered nonsense."""

    code = "engine_failed"
    status = 502
    retryable = True


class Timeout(OneboxError):
    """A deadline passed."""

    code = "timeout"
    status = 504
    retryable = True


class PluginFailed(OneboxError):
    """A plugin raised something that is not an `OneboxError`."""

    code = "plugin_failed"


class Internal(OneboxError):
    """A defect of ours; details are in the log, never in the message."""


class SetupError(OneboxError):
    """The launcher cannot go on; its message is the one line a user reads before exit code 1."""

    code = "setup_error"


def _subclasses(cls: type[OneboxError]) -> list[type[OneboxError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _subclasses(sub))]


def from_code(code: str, message: str, *, retry_after_s: float | None = None) -> OneboxError:
    """The error whose class has this wire code; an unknown code becomes `Internal`."""
    by_code = {cls.code: cls for cls in _subclasses(OneboxError) if cls is not OneboxError}
    return by_code.get(code, Internal)(message, retry_after_s=retry_after_s)
