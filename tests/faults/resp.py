"""RESP framing: where a command or a reply ends in a stream of bytes, and no more than that.

`redis` parses for its own use and does not show boundaries; a proxy between client and server needs them.
"""

from typing import Final

_LINE: Final = b"\r\n"
_BULKS: Final = frozenset(b"$=!")
_ARRAYS: Final = frozenset(b"*~>")
_MAPS: Final = frozenset(b"%|")
PUSHES: Final = frozenset({b"message", b"pmessage", b"smessage"})


def command_at(data: bytes | bytearray, start: int) -> tuple[list[bytes], int] | None:
    """The arguments of the command at `start` and where it ends; None while it is incomplete.

    Raises:
        ValueError: it is no array of bulk strings, as every client library sends.
    """
    head = data.find(_LINE, start)
    if head < 0:
        return None
    if data[start] != ord("*"):
        raise ValueError(f"a command begins with '*', not {bytes(data[start : start + 1])!r}")
    position, arguments = head + 2, list[bytes]()
    for _ in range(int(data[start + 1 : head])):
        end = data.find(_LINE, position)
        if end < 0:
            return None
        length = int(data[position + 1 : end])
        if len(data) < end + 4 + length:
            return None
        arguments.append(bytes(data[end + 2 : end + 2 + length]))
        position = end + 4 + length
    return arguments, position


def reply_end(data: bytes | bytearray, start: int) -> int | None:
    """Where the reply at `start` ends, nested ones included; None while it is incomplete."""
    pending, position = 1, start
    while pending:
        end = data.find(_LINE, position)
        if end < 0:
            return None
        kind, after = data[position], end + 2
        pending -= 1
        if kind in _BULKS:
            length = int(data[position + 1 : end])
            after += max(0, length + 2) if length >= 0 else 0
            if len(data) < after:
                return None
        elif kind in _ARRAYS:
            pending += max(0, int(data[position + 1 : end]))
        elif kind in _MAPS:
            pending += 2 * int(data[position + 1 : end])
        position = after
    return position


def is_push(reply: bytes) -> bool:
    """Whether the server sent this by itself: a published message, no command's reply."""
    if reply[:1] == b">":
        return True
    if reply[:1] != b"*":
        return False
    parts = reply.split(_LINE, 3)
    return len(parts) > 2 and parts[2] in PUSHES
