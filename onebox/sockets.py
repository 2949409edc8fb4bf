"""Listening sockets of our processes: who may be reached from where, and which ports are free.

The launcher opens the sockets of its children and keeps them open, so a worker that dies loses no connection that was
not yet accepted, and a taken port is an error before anything starts. A process started by hand opens its own.
"""

import errno
import ipaddress
import socket

from onebox.errors import SetupError
from onebox.settings import Settings

BACKLOG = 2048


def check_bind(settings: Settings) -> None:
    """Refuse to listen beyond this machine unless the user says it is meant.

    Raises:
        SetupError: `host` is not a loopback address and `insecure_bind` is off.
    """
    if settings.host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not settings.insecure_bind:
        raise SetupError(
            f"Will not listen on {settings.host!r}: keys and chats would cross the network without TLS, and the page "
            "asks nobody for a key. Keep ONEBOX_HOST=127.0.0.1 behind a proxy with TLS and sign-in, or set "
            "ONEBOX_INSECURE_BIND=true if that is meant."
        )


def listen(host: str, port: int, variable: str) -> socket.socket:
    """A listening, inheritable TCP socket; port 0 picks a free one. `variable` is the setting that moves the port.

    Raises:
        SetupError: the port is taken or may not be used.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SetupError(
                f"Port {port} on {host} is taken: another program listens there. "
                f"Stop that program, or choose another port with {variable}=<port>."
            ) from None
        raise SetupError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another address or port ({variable})."
        ) from None
    listener.listen(BACKLOG)
    listener.set_inheritable(True)
    return listener


def port_of(listener: socket.socket) -> int:
    """The port it listens on."""
    port: int = listener.getsockname()[1]
    return port


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return port_of(probe)
