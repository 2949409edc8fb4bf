"""`/v1/tasks` and `/v1/route` through the API."""

import httpx

from onebox.events import Completed, Routed, TextDelta, Usage, decode, is_terminal


def test_tasks_are_listed_with_texts_examples_and_schema(api: httpx.Client) -> None:
    tasks = {task["name"]: task for task in api.get("/v1/tasks").json()["data"]}
    assert {"chat", "summarize", "translate", "qa", "reason", "write"} == set(tasks)
    for task in tasks.values():
        assert set(task["title"]) == set(task["summary"]) == {"en", "zh"}
        assert {example["lang"] for example in task["examples"]} == {"en", "zh"}
        assert task["params_schema"]["type"] == "object"


def test_task_is_done_whole_with_its_events(api: httpx.Client) -> None:
    reply = api.post("/v1/tasks/write", json={"text": "A note on rivers", "max_tokens": 5}).json()
    assert reply["task"] == "write"
    assert reply["text"]
    assert reply["finish"] == "length"
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"]
    kinds = [event["kind"] for event in reply["events"]]
    assert (kinds[0], kinds[-1]) == ("routed", "completed")


def test_task_streams_its_events_with_one_terminal_at_the_end(api: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "A note on rivers"}], "max_tokens": 5, "stream": True}
    reply = api.post("/v1/tasks/write", json=body)
    events = [decode(block.split("\ndata: ", 1)[1]) for block in reply.text.split("\n\n") if block]
    assert [is_terminal(event) for event in events].index(True) == len(events) - 1
    assert events[-1] == Completed("length")
    assert any(isinstance(event, Routed) and event.tier == "explicit" for event in events)
    assert "".join(event.text for event in events if isinstance(event, TextDelta))
    assert any(isinstance(event, Usage) and event.completion_tokens == 5 for event in events)


def test_unknown_task_is_refused_with_the_known_ones(api: httpx.Client) -> None:
    refused = api.post("/v1/tasks/poem", json={"text": "x"})
    assert refused.status_code == 404
    error = refused.json()["error"]
    assert error["code"] == "task_not_found"
    assert "'poem'" in error["message"]
    assert "'chat'" in error["message"]


def test_task_wants_one_input_and_known_params(api: httpx.Client) -> None:
    for body in (
        {},
        {"text": "x", "messages": []},
        {"text": "  "},
        {"text": "x", "params": {"zzz": 1}},
        {"text": "x", "zzz": 1},
    ):
        assert api.post("/v1/tasks/chat", json=body).status_code == 400, body


def test_route_tells_the_decision_without_the_work(api: httpx.Client) -> None:
    routed = api.post("/v1/route", json={"text": "Translate into Chinese: the river is long."}).json()
    assert routed["task"] == "translate"
    assert sum(routed["probabilities"].values()) == 1 or abs(sum(routed["probabilities"].values()) - 1) < 1e-3
