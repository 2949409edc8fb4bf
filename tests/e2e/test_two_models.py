"""Two real models and a LoRA adapter in one product, as the fleet file says; about two minutes, so `faults` has it."""

import re
from collections.abc import Iterator
from contextlib import suppress

import httpx
import psutil
import pytest

from onebox.settings import Settings
from tests.agents.processes import until
from tests.product import KEY, Product, product
from tests.serving.lora import make_adapter

pytestmark = [pytest.mark.engine, pytest.mark.faults, pytest.mark.timeout(600)]

FILE = """
[models.small]
model = "smollm2-135m"
context = 2048
kv_cache_gib = 0.5

[models.small.adapters]
odd = "odd"

[models.large]
model = "qwen2.5-coder-0.5b"
context = 2048
kv_cache_gib = 0.5

[tasks]
default = ["small", "large"]
translate = "large"
"""
CHINESE = re.compile("[一-鿿]")


@pytest.fixture(scope="module")
def two(smollm2_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """The whole product with both models."""
    home = tmp_path_factory.mktemp("two")
    models = smollm2_settings.home_dir / "models"
    (home / "models").symlink_to(models)
    make_adapter(home / "odd", models / "smollm2-135m")
    (home / "fleet.toml").write_text(FILE)
    with product(home, {"ONEBOX_FLEET_FILE": str(home / "fleet.toml")}) as started:
        yield started


@pytest.fixture
def client(two: Product) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=two.api_url, headers={"authorization": f"Bearer {KEY}"}, timeout=120) as client:
        yield client


def said(client: httpx.Client, model: str, text: str = "The capital of France is") -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def test_each_task_and_each_name_is_answered_by_its_model(client: httpx.Client) -> None:
    small, large, odd = said(client, "small"), said(client, "large"), said(client, "odd")
    assert len({small, large, odd}) == 3
    assert said(client, "small") == small
    task = {"text": "Good morning, dear friends.", "params": {"target": "zh"}, "max_tokens": 24}
    translated = client.post("/v1/tasks/translate", json=task)
    assert translated.status_code == 200, translated.text
    assert CHINESE.search(translated.json()["text"])
    listed = {entry["id"]: entry for entry in client.get("/v1/models").json()["data"]}
    assert {"small", "large", "odd"} <= set(listed)
    assert listed["odd"]["parent"] == "small"


def test_the_other_model_answers_while_one_is_started_again(two: Product, client: httpx.Client) -> None:
    expected = said(client, "small")
    for process in psutil.Process(two.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "ServeReplica:onebox-small" in " ".join(process.cmdline()):
                process.kill()
    assert said(client, "chat", "Say hello.")
    assert client.get("/readyz").json()["models"]["small"] != "ready"
    until(lambda: client.get("/readyz").json()["models"]["small"] == "ready", 180)
    assert said(client, "small") == expected
