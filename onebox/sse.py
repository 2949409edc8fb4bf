"""Reads server-sent events off a response, as `onebox.client` needs them."""

from collections.abc import AsyncGenerator
from typing import Final

import httpx

# How the server says that a run has nothing behind the event that was asked for.
NOTHING_LEFT: Final = b": end\n"


async def sse_data(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The `data:` payloads of a stream of server-sent events, and `NOTHING_LEFT` where that is how it ends."""
    rest = b""
    async for chunk in response.aiter_raw():
        *blocks, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            data = [line[5:].lstrip() for line in block.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield b"\n".join(data)
    if rest.endswith(NOTHING_LEFT):
        yield NOTHING_LEFT
