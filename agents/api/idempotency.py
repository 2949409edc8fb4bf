"""The `Idempotency-Key` header: a caller's own name for a request, so that sending it again joins what it started.

What the same name with the same or another request means is decided in the store, by `agents.run_store`.
"""

import hashlib
import re
from typing import Final

import orjson
from fastapi import Request

from agents.runs import Idempotency
from onebox.errors import BadRequest

HEADER: Final = "idempotency-key"
LENGTH_MAX: Final = 255
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")


async def idempotency_of(request: Request) -> Idempotency | None:
    """The key of a request with what identifies it: its path and its JSON, however that is spaced and ordered.

    Raises:
        BadRequest: the key is empty, too long or not printable.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return None
    if len(key) > LENGTH_MAX or not _PRINTABLE.fullmatch(key):
        raise BadRequest(
            f"The Idempotency-Key is not usable: it must be 1 to {LENGTH_MAX} printable ASCII characters. Send a UUID.",
            param="Idempotency-Key",
        )
    body = orjson.dumps(orjson.loads(await request.body()), option=orjson.OPT_SORT_KEYS)
    digest = hashlib.sha256(request.url.path.encode() + b"\n" + body).hexdigest()
    return Idempotency(key, digest)
