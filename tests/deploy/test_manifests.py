"""The files for servers name only settings, modules and files that exist."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.fleet import ingress_host
from onebox.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", [ROOT / "deploy" / "compose.yaml", *DOCKERFILES], ids=lambda path: path.name)
def test_every_variable_in_a_manifest_is_a_setting(path: Path) -> None:
    used = set(re.findall(r"\bONEBOX_[A-Z_]+", path.read_text()))
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert used
    assert used - known == set()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_file_and_module_of_a_dockerfile_exists(path: Path) -> None:
    text = path.read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    for module in re.findall(r"(?:-m\", \"|python -m )([a-z_.]+)", text):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_holds_every_package_that_its_modules_import(path: Path) -> None:
    text = path.read_text()
    modules = re.findall(r"(?:-m\", \"|python -m )([a-z_.]+)", text)
    if path.name.startswith("engine"):
        modules += ["serving.deployment", "serving.vllm_engine", "deploy.cluster"]  # imported when they are needed
    names = [module if "." in module else f"{module}.__main__" for module in modules]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {names!r}];"
        "files = {name: getattr(module, '__file__', None) or '' for name, module in list(sys.modules.items())};"
        f"ours = {{name for name, file in files.items() if file.startswith({str(ROOT)!r}) and '/.venv/' not in file}};"
        "print(*{name.split('.')[0] for name in ours})"
    )
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    copied = {source for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for source in line.split()}
    assert set(done.stdout.split()) <= copied


def test_compose_builds_from_dockerfiles_that_exist() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    for service in services.values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists()
    assert {"redis", "engine", "gateway", "ui"} == set(services)


def test_the_engines_of_compose_listen_where_its_gateway_looks_for_them() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    engine, gateway = (services[name]["environment"]["ONEBOX_ENGINE_URL"] for name in ("engine", "gateway"))
    assert engine == gateway == f"http://engine:{Settings().engine_port}"
    assert ingress_host(Settings(engine_url=engine)) == "0.0.0.0"
    assert ingress_host(Settings()) == "127.0.0.1"


def test_the_serve_config_is_valid_in_rays_own_schema() -> None:
    code = (
        "import sys, yaml; from ray.serve.schema import ServeDeploySchema;"
        "schema = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1])));"
        "module, _, name = schema.applications[0].import_path.partition(':');"
        "import importlib; assert callable(getattr(importlib.import_module(module), name))"
    )
    done = subprocess.run(
        (sys.executable, "-c", code, str(ROOT / "deploy" / "serve.yaml")), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
