"""`python -m deploy.fleet`: the engine fleet of one machine, in the foreground.

Starts a private Ray cluster and on it a Serve application of `serving.deployment` for each model; the ingress listens
at `engine_port` before the engines have loaded and answers 5xx until then. SIGTERM or SIGINT drains and leaves no
process behind. With `--address` it is the command for a cluster that runs already, which is `deploy.cluster`'s work;
the launcher of everything is `deploy.launcher`.
"""

import argparse
import ctypes
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import psutil

from deploy import checks, cluster, ray_environment
from deploy.supervisor import FATAL
from onebox import logs
from onebox.errors import SetupError
from onebox.fleet_spec import FleetSpec, read_fleet
from onebox.settings import Settings, read_settings

NAMESPACE = "onebox"
HOST = "127.0.0.1"
WATCH_INTERVAL_S = 1.0
KILL_AFTER_S = 3.0
PR_SET_CHILD_SUBREAPER = 36

_log = logging.getLogger("onebox.fleet")


class _Lost(SetupError):
    """A part of a running fleet died; starting again may help."""


class _Stop(BaseException):
    """Somebody asked the fleet to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until a signal comes, or until what `arguments` ask for is done.

    The exit code is `FATAL` where the fleet could not start.
    """
    asked = _parser().parse_args(arguments)
    _catch_signals()
    try:
        settings = read_settings()
        logs.set_up(settings, "fleet")
        spec = read_fleet(settings)
        if asked.environment:
            for name, value in ray_environment.every_node(settings).items():
                sys.stdout.write(f"export {name}={value}\n")
        elif asked.config:
            sys.stdout.write(cluster.serve_config_text(spec, settings))
        elif asked.address is not None and asked.remove:
            cluster.remove(asked.address, settings)
        elif asked.address is not None:
            cluster.deploy(asked.address, spec, settings)
        else:
            run(settings, spec)
    except _Stop:
        return 0
    except SetupError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1 if isinstance(error, _Lost) else FATAL
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.fleet",
        description="Serve the models of the settings: without options on this machine, until a signal ends it.",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="serve on this Ray cluster instead; 'auto' finds it")
    parser.add_argument("--remove", action="store_true", help="with --address: take the fleet off the cluster")
    parser.add_argument("--config", action="store_true", help="print the config for `serve deploy` and KubeRay")
    parser.add_argument(
        "--environment", action="store_true", help="print what each node of a cluster needs before `ray start`"
    )
    return parser


def run(settings: Settings, spec: FleetSpec) -> None:
    """Serves until `_Stop`.

    Raises:
        SetupError: the fleet could not start, or a part of it died.
    """
    if settings.internal_token is None:
        raise SetupError(
            "The engine fleet has no internal token: its ports would answer anybody. "
            "Set ONEBOX_INTERNAL_TOKEN to a random string, for engines and gateways alike."
        )
    if not spec.here:
        raise SetupError("Every model of the fleet file has a url of its own: there is none to serve here.")
    _require_free(settings.engine_port)
    checks.check_adapters(settings)
    with ExitStack() as stack:
        stack.enter_context(_no_process_left())
        scratch = Path(tempfile.mkdtemp(prefix="ob-", dir="/tmp"))  # short: unix socket paths end at 107 bytes
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        # Ray reads these at import, and its processes inherit them.
        os.environ.update(
            ray_environment.every_node(settings)
            | ray_environment.own_folder(settings, scratch)
            | ray_environment.own_ports(settings, spec.replicas_most)
        )
        stack.enter_context(_cluster(settings, spec, scratch))
        _serve(settings, spec.with_threads(os.cpu_count() or 1), scratch)
        _watch()


def _serve(settings: Settings, spec: FleetSpec, scratch: Path) -> None:
    """Raises the ingress, then the engines of all models side by side; returns when all replicas are up."""
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    from serving.deployment import build

    log_folder = settings.home_dir / "logs" / "engine"
    log_folder.mkdir(parents=True, exist_ok=True)
    serve_log = LoggingConfig(
        encoding="JSON" if settings.log_format == "json" else "TEXT",
        log_level=settings.log_level.upper(),
        logs_dir=str(log_folder),
        enable_access_log=False,
    )
    host = ingress_host(settings)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=host, port=settings.engine_port),
        logging_config=serve_log,
    )
    logs.adopt("ray.serve")
    _log.info("ingress listens at http://%s:%d", host, settings.engine_port)
    started = time.monotonic()
    try:
        serve.run_many(
            [
                serve.RunTarget(build(model.settings), model.application, model.route_prefix, serve_log)
                for model in spec.here
            ]
        )
    except RuntimeError as error:
        for log in scratch.glob("session_latest/logs/worker-*.err"):
            shutil.copy(log, log_folder)  # the engine's own words; `scratch` goes away
        raise SetupError(f"The engine did not start: {_cause(str(error))} Logs are in {log_folder}.") from error
    for model in spec.here:
        _log.info("%d replica(s) of %s", model.settings.engine_replicas, model.application)
    _log.info("all ready after %.1f s", time.monotonic() - started)


def ingress_host(settings: Settings) -> str:
    """Loopback where gateways are told to come that way, else every address, as in a container."""
    return HOST if urlsplit(settings.engine_url).hostname in {HOST, "localhost"} else "0.0.0.0"


@contextmanager
def _cluster(settings: Settings, spec: FleetSpec, scratch: Path) -> Iterator[None]:
    """A Ray cluster of this process alone, shut down with its Serve instance."""
    import ray
    from ray import serve

    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, spec.replicas_most) + 1,
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
