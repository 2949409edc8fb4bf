"""Several models behind one gateway: who gets what, who stands in, and what a run taken over goes on with.

Each model is one scripted replica at a URL of its own; both would say the same, so their counters tell who spoke.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from deploy.store import EmbeddedStore
from onebox.client import Client
from onebox.events import Completed, Failed, TextDelta
from onebox.messages import user
from onebox.sockets import free_port
from tests.agents.processes import ADMIN_KEY, Child, Stack, run_stack, until

FILE = """
[models.small]
url = "{small}"

[models.large]
url = "{large}"

[models.large.adapters]
polite = "adapters/polite"

[tasks]
default = ["small", "large"]
translate = "large"
summarize = ["polite", "small"]
"""
STORY = [user("Tell a long story about a lighthouse")]
CHAT = "/v1/chat/completions"
SETTINGS = {"lease_s": "2", "lease_renew_s": "0.5", "engine_patience_s": "2", "router_engine": "false"}


@dataclass
class Models:
    """A gateway with two models, `small` and `large`; `large` has the adapter `polite`."""

    stack: Stack
    small: Child
    large: Child
    ports: dict[str, int]

    def spoken(self) -> dict[str, int]:
        """The tokens each model has spoken."""
        return {name: self._tokens(port) for name, port in self.ports.items()}

    def asked(self, path: str, **body: object) -> tuple[httpx.Response, list[str]]:
        """The reply to a request, and who spoke meanwhile."""
        before = self.spoken()
        reply = self.stack.client.post(path, json=body)
        return reply, [name for name, tokens in self.spoken().items() if tokens > before[name]]

    def states(self) -> dict[str, str]:
        """How the gateway finds its models."""
        states: dict[str, str] = self.stack.client.get("/readyz").json()["models"]
        return states

    def _tokens(self, port: int) -> int:
        headers = {"authorization": f"Bearer {self.stack.token}"}
        try:
            lines = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=headers, timeout=1.0).text.splitlines()
        except httpx.HTTPError:
            return 0
        return int(float(next(line.split()[1] for line in lines if line.startswith("onebox_engine_tokens_total "))))


@pytest.fixture
def models(valkey: EmbeddedStore, tmp_path: Path) -> Iterator[Models]:
    ports = {"small": free_port(), "large": free_port()}
    file = tmp_path / "fleet.toml"
    file.write_text(FILE.format(**{name: f"http://127.0.0.1:{port}" for name, port in ports.items()}))
    stack = Stack(tmp_path, valkey, SETTINGS | {"fleet_file": str(file)})
    small = stack.replica(ports["small"], model_context="4096")
    large = stack.replica(ports["large"], adapters='{"polite": "adapters/polite"}')
    try:
        small.start()
        large.start()
        with run_stack(stack, engine=False):
            until(lambda: stack.client.get("/readyz").status_code == 200)
            yield Models(stack, small, large, ports)
    finally:
        small.stop()
        large.stop()


def said(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def hello(model: str, tokens: int = 8) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": tokens}


def test_tasks_go_to_their_models_and_every_name_can_be_asked_for(models: Models) -> None:
    assert models.asked(CHAT, **hello("chat"))[1] == ["small"]
    reply, spoke = models.asked("/v1/tasks/translate", text="The river is long.", max_tokens=8)
    assert (reply.status_code, spoke) == (200, ["large"])
    assert models.asked("/v1/tasks/summarize", text="The river is long. " * 9, max_tokens=8)[1] == ["large"]
    assert models.asked(CHAT, **hello("small"))[1] == ["small"]
    (plain, by_large), (polite, by_polite) = models.asked(CHAT, **hello("large")), models.asked(CHAT, **hello("polite"))
    assert (by_large, by_polite) == (["large"], ["large"])
    assert said(plain) != said(polite)
    refused = models.stack.client.post(CHAT, json=hello("huge"))
    assert refused.status_code == 404
    assert all(f"'{name}'" in refused.json()["error"]["message"] for name in ("auto", "chat", "small", "polite"))

    listed = {entry["id"]: entry for entry in models.stack.client.get("/v1/models").json()["data"]}
    assert listed["translate"]["onebox"] == {"models": ["large"]}
    assert listed["chat"]["onebox"] == {"models": ["small", "large"]}
    assert listed["small"]["max_model_len"] == 4096
    assert listed["polite"]["parent"] == "large"
    assert listed["polite"]["onebox"] == {"tasks": ["summarize"], "answers": True}
    assert models.states() == {"small": "ready", "large": "ready"}


def test_another_model_answers_while_the_preferred_one_is_away(models: Models) -> None:
    models.small.kill()
    reply, spoke = models.asked(CHAT, **hello("chat"))
    assert (reply.status_code, spoke) == (200, ["large"])
    ready = models.stack.client.get("/readyz")
    assert (ready.status_code, ready.json()["model"], ready.json()["models"]["small"]) == (200, "large", "down")
    assert 'onebox_models_away_total{model="small"} 1.0' in models.stack.client.get("/metrics").text
    named = models.stack.client.post(CHAT, json=hello("small"))
    assert (named.status_code, named.json()["error"]["code"]) == (503, "unavailable")
    models.small.start()
    until(lambda: models.asked(CHAT, **hello("chat"))[1] == ["small"])

    models.large.kill()
    refused = models.stack.client.post("/v1/tasks/translate", json={"text": "The river is long.", "max_tokens": 8})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    ready = models.stack.client.get("/readyz")
    assert ready.status_code == 503
    assert "'translate'" in ready.json()["detail"]


def test_model_that_hangs_is_passed_over_before_its_first_token(models: Models) -> None:
    assert models.small.process is not None
    models.small.process.send_signal(signal.SIGSTOP)
    try:
        reply, spoke = models.asked(CHAT, **hello("chat"))
    finally:
        models.small.process.send_signal(signal.SIGCONT)
    assert (reply.status_code, spoke) == (200, ["large"])


async def test_reply_that_has_begun_is_never_ended_by_another_model(models: Models) -> None:
    async with Client(models.stack.url, ADMIN_KEY) as client:
        events, before = [], 0
        async for event in client.stream(STORY, model="chat"):
            events.append(event)
            if len(events) == 8:
                before = models.spoken()["large"]
                models.small.kill()
    assert any(isinstance(event, TextDelta) for event in events)
    assert isinstance(events[-1], Failed)
    assert models.spoken()["large"] == before


async def test_run_taken_over_stays_at_the_model_it_was_at(models: Models) -> None:
    stack, port = models.stack, free_port()
    heir = stack.worker(port)
    heir.start()
    try:
        async with Client(stack.url, ADMIN_KEY) as first, Client(f"http://127.0.0.1:{port}", ADMIN_KEY) as second:
            undisturbed = [event async for event in first.stream(STORY, model="chat")]
            models.small.kill()
            run = await first.start(STORY, model="chat")
            async for number, _ in second.follow(run.run_id):
                if number >= 8:
                    break
            models.small.start()
            until(lambda: models.states()["small"] == "ready")
            quiet = models.spoken()["small"]
            stack.gateway.kill()
            seen = [event async for _, event in second.follow(run.run_id)]
    finally:
        heir.stop()
    assert isinstance(seen[-1], Completed)
    assert models.spoken()["small"] == quiet
    texts = ["".join(event.text for event in all_ if isinstance(event, TextDelta)) for all_ in (undisturbed, seen)]
    assert texts[0] == texts[1] != ""
