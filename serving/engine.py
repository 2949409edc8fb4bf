"""What an engine is to the server: the seam between `serving.server` and the two engines.

`serving.vllm_engine` and `serving.scripted_engine` implement it; `tests/serving/test_engine_contract.py` holds both
to the same behaviour. The HTTP side (tokens, status codes, coalescing) is `serving.server`.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from serving.protocol import End, Frame, GenerateRequest, ModelCard, TokenizeReply, TokenizeRequest

Batch = tuple[Frame] | tuple[Frame, End] | tuple[End]


class Engine(Protocol):
    """Something that generates."""

    def model_card(self) -> ModelCard:
        """What the engine serves and its limits; `tokens_per_s` is the server's to fill in."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Batch, None]:
        """All tokens drawn since the last step, merged into one frame; the last step also has the `End`.

        A consumer that stays away loses nothing: its next step has more tokens. Closing the generator aborts.

        Raises:
            BadRequest: before the first step; `PromptTooLong` has both counts.
            Overloaded: the engine's own queue is full; before the first step.
            EngineFailed: the reply broke off.
            Unavailable: the engine is dead.
        """
        ...

    async def settle(self) -> None:
        """Returns once the engine is rid of every request that was aborted before this call."""
        ...

    def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        """Ids and pieces of a text, or of a chat prompt rendered with the model's template.

        Raises:
            BadRequest: neither or both are given, or there is no template.
        """
        ...

    async def check(self) -> None:
        """Returns when the engine lives.

        Raises:
            Unavailable: it is dead and will not come back in this process.
        """
        ...

    def kv_use(self) -> float:
        """The share of the KV cache that requests in work hold, from 0 to 1; 0 where there is none."""
        ...

    def metrics(self) -> bytes:
        """The engine's own metrics in Prometheus text format, empty when it has none."""
        ...

    async def close(self) -> None:
        """Frees everything, processes included. Running requests break off."""
        ...
