"""One gateway worker: `python -m agents [--fd N] [--place K]`.

The launcher hands its workers a listening socket, N, and gives each a place, K, at which they count for one another.
"""

import argparse
import asyncio
import logging
import socket
import sys
from pathlib import Path

import uvicorn
import uvloop

from agents.app import create_app
from agents.shared_metrics import Place, metrics_folder
from onebox import logs
from onebox.errors import SetupError
from onebox.settings import Settings, read_settings
from onebox.sockets import check_bind, listen

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve until SIGTERM or SIGINT, then let running streams end. The exit code."""
    parser = argparse.ArgumentParser(prog="python -m agents", description="One Onebox gateway worker.")
    parser.add_argument("--fd", type=int, help="an inherited listening socket; unset: host and api_port are bound")
    parser.add_argument("--place", type=int, help="this worker's number among those of ONEBOX_HOME; unset: it is alone")
    arguments = parser.parse_args()
    try:
        settings = read_settings()
        logs.set_up(settings, "gateway", arguments.place)
        listener = socket.socket(fileno=arguments.fd) if arguments.fd is not None else _listen(settings)
        # The connection of a reader who was dropped lives until its buffer is taken; this ends it where it never is.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2 * settings.reader_stall_s * 1000))
        # The system's buffer of a reader is bounded as ours is (it doubles the value); else it grows to megabytes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.reader_buffer_bytes // 2)
        app = create_app(settings, _take(arguments.place, settings.home_dir))
    except SetupError as error:
        print(error.message, file=sys.stderr)  # noqa: T201  # the one line a user reads
        return 1
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        log_level=settings.log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, int(settings.drain_timeout_s)),
    )
    server = uvicorn.Server(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve(sockets=[listener]))
    return 0 if server.started else 1


def _take(number: int | None, home: Path) -> Place | None:
    """The place, taken; none where it cannot be: then the worker counts for itself."""
    if number is None:
        return None
    place = Place(metrics_folder(home), number)
    try:
        place.take()
    except OSError as error:
        logger.warning("Metrics cannot be shared with other workers: %s", error.strerror)
        return None
    return place


def _listen(settings: Settings) -> socket.socket:
    check_bind(settings)
    return listen(settings.host, settings.api_port, "ONEBOX_API_PORT")


if __name__ == "__main__":
    sys.exit(main())
