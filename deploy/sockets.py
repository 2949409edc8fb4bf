"""Listening sockets the launcher opens and hands to its children.

The parent keeps them open, so a worker that dies loses no connection that was not yet accepted, and a taken
port is an error before anything starts.
"""

import errno
import socket

from onebox.errors import SetupError


def listen(host: str, port: int, variable: str) -> socket.socket:
    """A listening, inheritable TCP socket; port 0 picks a free one.

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
    listener.listen(2048)
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
