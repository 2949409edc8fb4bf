"""The environment that Ray's processes read: what every node of a fleet wants, and what keeps instances apart.

`deploy.fleet` sets it for a private fleet; for a cluster `python -m deploy.fleet --environment` prints the first part.
"""

import os
import random
import socket
from contextlib import ExitStack
from pathlib import Path

from onebox.errors import SetupError
from onebox.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
INGRESS_PORTS_FROM, INGRESS_PORTS_TO = 20_000, 32_000  # below Linux' ephemeral range


def every_node(settings: Settings) -> dict[str, str]:
    """What makes Ray quiet and its ingress fast, on one machine or many."""
    environment = {
        "PYTHONWARNINGS": "ignore",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_SCHEDULER_EVENTS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Ray gives its workers the lowest but four priority; the engine is what everybody waits for.
        "RAY_worker_niceness": "0",
        # On a busy machine the proxy takes longer than the default 5 s, is killed for it and never comes up.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }
    if settings.engine_ingress == "haproxy":
        environment |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            # HAProxy learns of a leaving replica from the controller at once, by its own check after 5 s at most.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        }
    return environment


def python_path() -> str:
    """Where child processes find this instance's code."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def own_folder(settings: Settings, scratch: Path) -> dict[str, str]:
    """What keeps the files of a node's ingress, and the code its workers import, this instance's own."""
    environment = {
        "PYTHONPATH": python_path(),
        "RAY_enable_metrics_collection": "1" if settings.ray_metrics else "0",
    }
    if settings.engine_ingress == "haproxy":
        environment |= {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "haproxy.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        }
    return environment


def own_ports(settings: Settings, replicas: int) -> dict[str, str]:
    """Free ports for the ingress of an instance that has its machine with others, and for `replicas` behind it."""
    if settings.engine_ingress != "haproxy":
        return {}
    ports = _free_ports(4)
    replicas_from, replicas_to = _free_range(64 + 2 * replicas)
    middle = (replicas_from + replicas_to) // 2
    return {
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[1]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports[3]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas_from),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(middle),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(middle + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(replicas_to),
    }


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _free_range(size: int) -> tuple[int, int]:
    """The ends of a run of ports that are all free now, at a random place: instances side by side do not meet."""
    for _ in range(50):
        first = random.randrange(INGRESS_PORTS_FROM, INGRESS_PORTS_TO - size)
        with ExitStack() as stack:
            try:
                for port in range(first, first + size):
                    stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
        return first, first + size - 1
    raise SetupError(
        f"No {size} free ports in a row between {INGRESS_PORTS_FROM} and {INGRESS_PORTS_TO}. Stop some servers."
    )
