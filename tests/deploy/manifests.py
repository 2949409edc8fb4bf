"""The Kubernetes manifests as kubectl renders them, and what the tests ask of them."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.product import ROOT

KUBERAY = ROOT / "deploy" / "kuberay"
OVERLAYS = ("cpu", "gpu", "gpu-tp4")
COMPONENTS = tuple(sorted(path.name for path in (KUBERAY / "components").iterdir()))
VARIANTS = [(overlay, ()) for overlay in OVERLAYS] + [(overlay, COMPONENTS) for overlay in OVERLAYS]
SECRETS = ("admin-key", "ui-key", "internal-token", "store-password", "fleet-store-password")

Object = dict[str, Any]

variants = pytest.mark.parametrize(("overlay", "components"), VARIANTS)


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that a manifest makes: the workload's name, the pod's labels and its spec."""

    name: str
    labels: dict[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        """All of them, those that run first included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@functools.cache
def render(overlay: str, components: tuple[str, ...] = ()) -> tuple[Object, ...]:
    """The objects of an overlay, some optional components added, with secrets made for the occasion."""
    with tempfile.TemporaryDirectory(prefix="ob-") as folder:
        copy = Path(folder) / "kuberay"
        shutil.copytree(KUBERAY, copy, ignore=shutil.ignore_patterns("secrets.env"))
        for secrets in ("cpu", "gpu"):
            values = "\n".join(f"{key}=secret-of-{key}" for key in SECRETS)
            (copy / "overlays" / secrets / "secrets.env").write_text(values)
        own = copy / "overlays" / overlay / "kustomization.yaml"
        written = yaml.safe_load(own.read_text())
        named = [f"../../components/{name}" for name in components if name != "model-hub"]  # every overlay has that
        own.write_text(yaml.safe_dump(written | {"components": [*written.get("components", []), *named]}))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kubectl = shutil.which("kubectl", path=path)
        assert kubectl is not None, "kubectl is not installed; it comes with the dev dependencies"
        done = subprocess.run((kubectl, "kustomize", str(own.parent)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(objects: tuple[Object, ...], kind: str) -> dict[str, Object]:
    """The objects of a kind by their names."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def pods(objects: tuple[Object, ...]) -> dict[str, Pod]:
    """Every pod that these objects make."""
    return {pod.name: pod for pod in _pods(objects)}


def _pods(objects: tuple[Object, ...]) -> Iterator[Pod]:
    for one in objects:
        name = one["metadata"]["name"]
        if one["kind"] in {"Deployment", "StatefulSet"}:
            yield _pod(name, one["spec"]["template"])
        elif one["kind"] == "RayService":
            cluster = one["spec"]["rayClusterConfig"]
            yield _pod("head", cluster["headGroupSpec"]["template"])
            for group in cluster["workerGroupSpecs"]:
                yield _pod(group["groupName"], group["template"])


def _pod(name: str, template: Object) -> Pod:
    return Pod(name, template["metadata"]["labels"], template["spec"])


def environment(objects: tuple[Object, ...], container: Object) -> dict[str, str]:
    """A container's variables as it sees them, references to others and to secrets resolved."""
    maps, secrets = of_kind(objects, "ConfigMap"), of_kind(objects, "Secret")
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= maps[source["configMapRef"]["name"]]["data"]
    for variable in container.get("env", []):
        if "value" in variable:
            value = variable["value"]
            for name, known in values.items():
                value = value.replace(f"$({name})", known)
        else:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["key"] in secrets[reference["name"]]["data"], reference
            value = f"secret-of-{reference['key']}"
        values[variable["name"]] = value
    return values


def python_output(code: str, **variables: str) -> str:
    """What a Python of its own prints: Ray reads its environment at import."""
    done = subprocess.run(
        (sys.executable, "-c", code),
        env=clean_environment() | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def clean_environment() -> dict[str, str]:
    """This process's environment without what Onebox and Ray read."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("ONEBOX_", "RAY_"))}
