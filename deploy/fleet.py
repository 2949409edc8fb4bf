"""`python -m deploy.fleet`: the engine fleet of one machine, in the foreground.

Starts a private Ray cluster and on it the Serve application of `serving.deployment`; the ingress listens at
`engine_port` before the engines have loaded and answers 5xx until then. SIGTERM or SIGINT drains and leaves no process
behind. On a cluster `serve deploy deploy/serve.yaml` does this job; the launcher of everything is `deploy.launcher`.
"""

import ctypes
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import psutil

from deploy.supervisor import FATAL
from onebox.errors import SetupError
from onebox.settings import Settings, read_settings

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "onebox"
HOST = "127.0.0.1"
INGRESS_PORTS_FROM, INGRESS_PORTS_TO = 20_000, 32_000  # below Linux' ephemeral range
WATCH_INTERVAL_S = 1.0
KILL_AFTER_S = 3.0
PR_SET_CHILD_SUBREAPER = 36

_log = logging.getLogger("onebox.fleet")


class _Lost(SetupError):
    """A part of a running fleet died; starting again may help."""


class _Stop(BaseException):
    """Somebody asked the fleet to end."""


def main() -> int:
    """Runs until a signal comes. The exit code: `FATAL` where the fleet could not start."""
    _catch_signals()
    try:
        settings = read_settings()
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        run(settings)
    except _Stop:
        return 0
    except SetupError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1 if isinstance(error, _Lost) else FATAL
    return 0


def run(settings: Settings) -> None:
    """Serves until `_Stop`.

    Raises:
        SetupError: the fleet could not start, or a part of it died.
    """
    if settings.internal_token is None:
        raise SetupError(
            "The engine fleet has no internal token: its ports would answer anybody. "
            "Set ONEBOX_INTERNAL_TOKEN to a random string, for engines and gateways alike."
        )
    _require_free(settings.engine_port)
    with ExitStack() as stack:
        stack.enter_context(_no_process_left())
        scratch = Path(tempfile.mkdtemp(prefix="ob-", dir="/tmp"))  # short: unix socket paths end at 107 bytes
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        # Ray reads these at import, and its processes inherit them.
        os.environ.update(_ray_environment(settings, scratch))
        stack.enter_context(_cluster(settings, scratch))
        _serve(settings, scratch)
        _watch()


def _serve(settings: Settings, scratch: Path) -> None:
    """Raises the ingress, then the engines; returns when all replicas are up."""
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    from serving.deployment import APP_NAME, build

    log_folder = settings.home_dir / "logs" / "engine"
    log_folder.mkdir(parents=True, exist_ok=True)
    serve_log = LoggingConfig(log_level=settings.log_level.upper(), logs_dir=str(log_folder), enable_access_log=False)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=HOST, port=settings.engine_port),
        logging_config=serve_log,
    )
    _log.info("ingress listens at http://%s:%d", HOST, settings.engine_port)
    started = time.monotonic()
    try:
        serve.run(build(settings), name=APP_NAME, route_prefix="/", logging_config=serve_log)
    except RuntimeError as error:
        for log in scratch.glob("session_latest/logs/worker-*.err"):
            shutil.copy(log, log_folder)  # the engine's own words; `scratch` goes away
        raise SetupError(f"The engine did not start: {_cause(str(error))} Logs are in {log_folder}.") from error
    _log.info("%d engine replica(s) ready after %.1f s", settings.engine_replicas, time.monotonic() - started)


@contextmanager
def _cluster(settings: Settings, scratch: Path) -> Iterator[None]:
    """A Ray cluster of this process alone, shut down with its Serve instance."""
    import ray
    from ray import serve

    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, settings.engine_replicas) + 1,
            object_store_memory=100 * 1024 * 1024,  # bytes; nothing but small control messages goes through it
            include_dashboard=False,
            namespace=NAMESPACE,
            log_to_driver=settings.log_level == "debug",
            logging_level=logging.ERROR,
            _temp_dir=str(scratch),
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise SetupError(f"Ray did not start: {_cause(str(error))} Free memory and disk space, then retry.") from error
    _catch_signals()  # ray.init has put its own handlers there
    try:
        yield
    finally:
        _log.info("stopping")
        serve.shutdown()
        ray.shutdown()


@contextmanager
def _no_process_left() -> Iterator[None]:
    """Adopts orphaned descendants (Serve's HAProxy, vLLM's core) and ends whatever outlives the cluster."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        left = psutil.Process().children(recursive=True)
        for process in left:
            with _gone_is_fine():
                process.terminate()
        _, alive = psutil.wait_procs(left, timeout=KILL_AFTER_S)
        for process in [*alive, *psutil.Process().children(recursive=True)]:
            with _gone_is_fine():
                process.kill()
        psutil.wait_procs(alive, timeout=KILL_AFTER_S)


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        return


def _watch() -> None:
    """Returns never while the cluster lives."""
    core = [child for child in psutil.Process().children() if child.name() in {"raylet", "gcs_server"}]
    while True:
        for process in core:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise _Lost(f"Ray's process {process.pid} died. The fleet has to be started again.")
        time.sleep(WATCH_INTERVAL_S)


def _ray_environment(settings: Settings, scratch: Path) -> dict[str, str]:
    """What makes Ray quiet, private to this instance and able to import the repository."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "ignore",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_SCHEDULER_EVENTS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Ray gives its workers the lowest but four priority; the engine is what everybody waits for.
        "RAY_worker_niceness": "0",
        # On a busy machine the proxy takes longer than the default 5 s, is killed for it and never comes up.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }
    if settings.engine_ingress == "haproxy":
        ports = _free_ports(5)
        replicas_from, replicas_to = _free_range(64 + 2 * settings.engine_replicas)
        environment |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "haproxy.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[0]),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[1]),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports[3]),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas_from),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str((replicas_from + replicas_to) // 2),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str((replicas_from + replicas_to) // 2 + 1),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(replicas_to),
            # HAProxy learns of a leaving replica from the controller at once, by its own check after 5 s at most.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        }
    return environment


def _require_free(port: int) -> None:
    """Serve binds with SO_REUSEPORT and would silently share a taken port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise SetupError(
                f"Port {port} is taken by another program. Stop it, or set ONEBOX_ENGINE_PORT to a free port."
            ) from None


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


def _cause(message: str) -> str:
    """The last line of a remote traceback that names an error, without the error's type."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line or "Exception: " in line]
    return (named or lines or ["unknown reason."])[-1].split("Error: ")[-1].rstrip(".") + "."


def _catch_signals() -> None:
    signal.signal(signal.SIGTERM, _raise_stop)
    signal.signal(signal.SIGINT, _raise_stop)


def _raise_stop(signum: int, frame: FrameType | None) -> None:
    raise _Stop


if __name__ == "__main__":
    sys.exit(main())
