"""The bytes of an OpenAI chat stream: one line per event, built without pydantic as it is once per token.

Whole replies are in `agents.api.chat`; the events themselves are `onebox.events`.
"""

from typing import Final

import orjson

from onebox.errors import OneboxError
from onebox.events import Event, Routed, TextDelta, Token, Usage, encode

DONE: Final = b"data: [DONE]\n\n"
_TAIL: Final = b'},"logprobs":null,"finish_reason":null}]}\n\n'


class ChunkEncoder:
    """Encodes the chunks of one reply."""

    def __init__(self, run_id: str, model: str, created: int) -> None:
        head = orjson.dumps({"id": run_id, "object": "chat.completion.chunk", "created": created, "model": model})
        self._head = b"data: " + head[:-1]
        self._text_head = self._head + b',"choices":[{"index":0,"delta":{"content":'

    def opening(self, onebox: bytes) -> bytes:
        """The first chunk: the role and the `onebox` object."""
        choice = b',"choices":[{"index":0,"delta":{"role":"assistant","content":""'
        return self._head + b',"onebox":' + onebox + choice + _TAIL

    def text(self, delta: TextDelta) -> bytes:
        """A piece of the reply."""
        if not delta.tokens:
            return self._text_head + orjson.dumps(delta.text) + _TAIL
        content = orjson.dumps({"content": [token_logprob(token) for token in delta.tokens]})
        return self._text_head + orjson.dumps(delta.text) + b'},"logprobs":' + content + b',"finish_reason":null}]}\n\n'

    def event(self, event: Event) -> bytes:
        """An event that is no text, for those who asked."""
        return self._head + b',"choices":[],"onebox":{"event":' + encode(event) + b"}}\n\n"

    def finish(self, reason: str) -> bytes:
        """The last chunk with a choice."""
        return (
            self._head
            + b',"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"%b"}]}\n\n' % reason.encode()
        )

    def usage(self, usage: Usage) -> bytes:
        """The usage chunk."""
        return self._head + b',"choices":[],"usage":' + orjson.dumps(usage_object(usage)) + b"}\n\n"


def error_line(error: OneboxError) -> bytes:
    """The line that ends a broken stream."""
    return b"data: " + orjson.dumps(error_object(error)) + b"\n\n"


def error_object(error: OneboxError) -> dict[str, dict[str, object]]:
    """The error in OpenAI's shape."""
    kind = "invalid_request_error" if error.status < 500 and error.status != 429 else "server_error"
    return {
        "error": {
            "message": error.message,
            "type": kind if error.status != 429 else "rate_limit_error",
            "param": error.param,
            "code": error.code,
            "retryable": error.retryable,
        }
    }


def usage_object(usage: Usage) -> dict[str, int]:
    """Usage in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def token_logprob(token: Token) -> dict[str, object]:
    """A token's log-probability in OpenAI's shape."""
    rivals = [{"token": r.text, "logprob": r.logprob, "bytes": list(r.text.encode())} for r in token.top]
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.text.encode()),
        "top_logprobs": rivals,
    }


def onebox_object(run_id: str, conversation_id: str | None, turn_id: str | None, routed: Routed | None) -> bytes:
    """The `onebox` object of a reply."""
    return orjson.dumps({"run_id": run_id, "conversation": conversation_id, "turn": turn_id, "route": routed})
