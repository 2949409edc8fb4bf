"""Several models in one fleet: each its own application behind one ingress, in both ingress modes."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.agents.processes import until
from tests.processes import ROOT, FleetSpec, run_fleet

FILE = """
[models.small]
context = 1024
replicas = 2

[models.small-too]
context = 2048

[models.small-too.settings]
scripted_itl_ms = 0.0
"""


@pytest.mark.parametrize("ingress", ["haproxy", pytest.param("proxy", marks=pytest.mark.faults)])
def test_each_model_answers_under_its_prefix_and_at_its_doors(tmp_path: Path, ingress: str) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(FILE)
    values = {"home": str(tmp_path / "home"), "engine": "scripted", "engine_ingress": ingress, "fleet_file": str(file)}
    with (
        run_fleet(FleetSpec(values), tmp_path / "fleet.log", "/m/small-too") as fleet,
        httpx.Client(headers=fleet.headers, timeout=10.0) as client,
    ):
        until(lambda: len(client.get(f"{fleet.url}/m/small/v1/fleet").json()["replicas"]) == 2)
        lengths, doors = {}, {}
        for name in ("small", "small-too"):
            card = client.get(f"{fleet.url}/m/{name}/v1/model").raise_for_status()
            replicas = client.get(f"{fleet.url}/m/{name}/v1/fleet").raise_for_status().json()["replicas"]
            lengths[name], doors[name] = card.json()["context_length"], {replica["door"] for replica in replicas}
            assert card.headers["x-onebox-replica"] in doors[name]
            for door in doors[name]:
                assert client.get(f"{door}/v1/model").json()["context_length"] == lengths[name]
        assert lengths == {"small": 1024, "small-too": 2048}
        assert (len(doors["small"]), len(doors["small-too"])) == (2, 1)
        generate = {"request_id": "one", "messages": [{"role": "user", "content": "Hi"}], "sampling": {"max_tokens": 4}}
        reply = client.post(f"{fleet.url}/m/small/v1/generate", json=generate)
        assert (reply.status_code, '"finish"' in reply.text) == (200, True)
        for path in ("/v1/model", "/m/v1/model", "/m/smaller/v1/model"):
            assert client.get(f"{fleet.url}{path}").status_code == 404


def test_gpus_of_a_replica_are_placed_together_and_stages_may_be_apart() -> None:
    code = (
        "import json, sys; from onebox.settings import Settings; import serving.deployment as deployment;"
        "deployment._has_gpus = lambda: True;"
        "place = lambda **values: deployment._placement(Settings(**values));"
        "print(json.dumps([place(), place(tensor_parallel=4), place(tensor_parallel=2, pipeline_parallel=2)]))"
    )
    done = subprocess.run((sys.executable, "-W", "ignore", "-c", code), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, layers, stages = json.loads(done.stdout)
    assert one == {"ray_actor_options": {"num_cpus": 1, "num_gpus": 1}}
    for several, strategy in ((layers, "STRICT_PACK"), (stages, "PACK")):
        assert several["placement_group_bundles"] == [{"CPU": 1.0, "GPU": 1.0}] * 4
        assert several["placement_group_strategy"] == strategy
