"""API keys: who may call, and as which tenant.

Only SHA-256 hashes are stored. The keys of the settings need no store, so the page's key works at once.
"""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from typing import Final

import orjson

from agents.store import Store
from onebox.errors import Unauthorized
from onebox.settings import Settings

KEYS: Final = "onebox:keys"
DEFAULT_TENANT: Final = "default"
CACHE_S: Final = 10.0
CACHE_MAX: Final = 4096

_CREATE_FIRST: Final = """
if redis.call('HLEN', KEYS[1]) > 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
"""


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller."""

    tenant: str
    admin: bool


class Keys:
    """Resolves bearer tokens; found ones are remembered for ten seconds."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._store = store
        self._fixed: list[tuple[str, Principal]] = []
        if settings.admin_key is not None:
            self._fixed.append((_digest(settings.admin_key.get_secret_value()), Principal(DEFAULT_TENANT, True)))
        if settings.ui_key is not None:
            self._fixed.append((_digest(settings.ui_key.get_secret_value()), Principal(DEFAULT_TENANT, False)))
        self._known: dict[str, tuple[float, Principal]] = {}

    async def resolve(self, token: str | None) -> Principal:
        """The key's owner.

        Raises:
            Unauthorized: no key, or nobody's.
            StoreUnavailable: it cannot be looked up now.
        """
        if not token:
            raise Unauthorized("No API key was given. Send it as 'Authorization: Bearer <key>'.")
        digest = _digest(token)
        for known, principal in self._fixed:
            if hmac.compare_digest(known, digest):
                return principal
        now = time.monotonic()
        if (hit := self._known.get(digest)) is not None and now - hit[0] < CACHE_S:
            return hit[1]
        record = await self._store.hash_get(KEYS, digest)
        if record is None:
            raise Unauthorized(
                "The API key is not known here. Use the key printed at the first start, or ask an admin."
            )
        owner = orjson.loads(record)
        principal = Principal(owner["tenant"], owner["admin"])
        if len(self._known) >= CACHE_MAX:
            self._known.clear()
        self._known[digest] = (now, principal)
        return principal


async def ensure_admin_key(store: Store) -> str | None:
    """A new admin key, the one time that the store has no key at all; after that None."""
    key = f"sk-onebox-{secrets.token_urlsafe(24)}"
    record = orjson.dumps({"tenant": DEFAULT_TENANT, "admin": True, "created": int(time.time())})
    made = await store.run(_CREATE_FIRST, [KEYS], [_digest(key), record])
    return key if made else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
