"""The fleet file: what it says becomes each model's settings, and every mistake in it is told with its place."""

from pathlib import Path

import pytest
import yaml

from deploy import checks, cluster
from onebox.errors import SetupError
from onebox.fleet_spec import FleetSpec, Target, read_fleet
from onebox.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TWO = """
[models.small]
model = "smollm2-135m"
replicas = 2
kv_cache_gib = 0.5

[models.large]
model = "qwen2.5-coder-0.5b"
context = 4096
cpu_threads = 1

[models.large.settings]
engine_max_ongoing = 16

[models.large.adapters]
polite = "adapters/polite"

[tasks]
default = ["small", "large"]
translate = "large"
summarize = ["polite", "large", "polite"]
"""


def fleet(folder: Path, text: str, **settings: object) -> FleetSpec:
    path = folder / "fleet.toml"
    path.write_text(text)
    return read_fleet(Settings.model_validate({"fleet_file": path} | settings))


def test_each_model_has_the_fleets_settings_and_its_own(tmp_path: Path) -> None:
    spec = fleet(tmp_path, TWO, engine_max_ongoing=8, engine_url="http://engines:8100/")
    small, large = spec.models["small"].settings, spec.models["large"].settings
    assert (small.model, small.engine_replicas, small.cpu_kv_cache_gib) == ("smollm2-135m", 2, 0.5)
    assert (large.model, large.engine_replicas, large.model_context) == ("qwen2.5-coder-0.5b", 1, 4096)
    assert (small.engine_max_ongoing, large.engine_max_ongoing) == (8, 16)
    assert (small.engine_url, large.engine_url) == ("http://engines:8100/m/small", "http://engines:8100/m/large")
    assert large.adapters == {"polite": str(tmp_path / "adapters/polite")}
    assert [model.application for model in spec.here] == ["onebox-small", "onebox-large"]
    assert [model.route_prefix for model in spec.here] == ["/m/small", "/m/large"]


def test_tasks_ask_their_models_in_order_and_others_the_default(tmp_path: Path) -> None:
    spec = fleet(tmp_path, TWO)
    assert spec.order("translate") == ("large",)
    assert spec.order("summarize") == ("polite", "large")
    assert spec.order("chat") == spec.order(None) == ("small", "large")
    assert spec.targets()["polite"] == Target("large", "polite")
    without = fleet(tmp_path, TWO.partition("[tasks]")[0])
    assert without.order("chat") == ("small", "large")


def test_without_a_file_there_is_one_model_as_the_settings_say() -> None:
    spec = read_fleet(Settings(engine_url="http://engines:8100"))
    (model,) = spec.here
    assert not spec.several
    assert (model.application, model.route_prefix, model.settings.engine_url) == ("onebox", "/", "http://engines:8100")


def test_cores_are_divided_among_all_replicas_that_say_nothing_of_it(tmp_path: Path) -> None:
    spec = fleet(tmp_path, TWO).with_threads(12)
    assert spec.models["small"].settings.cpu_threads == 4
    assert spec.models["large"].settings.cpu_threads == 1


def test_gpus_of_a_replica_are_divided_among_its_stages(tmp_path: Path) -> None:
    spec = fleet(tmp_path, "[models.a]\ngpus = 8\npipeline_parallel = 2")
    assert (spec.models["a"].settings.tensor_parallel, spec.models["a"].settings.pipeline_parallel) == (4, 2)


def test_model_of_another_fleet_is_asked_there_and_not_started_here(tmp_path: Path) -> None:
    spec = fleet(tmp_path, '[models.a]\n[models.b]\nurl = "https://other:8100"')
    assert spec.models["b"].settings.engine_url == "https://other:8100"
    assert [model.name for model in spec.here] == ["a"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"\[models\]: there is no model"),
        ("[models.a", "cannot be read"),
        ("[model.a]", r"key 'model' is unknown. Did you mean 'models'\?"),
        ("models = 3", r"\[models\]: 3 is no table"),
        ("[models.A]", "'A' is no name"),
        ("[models.translate]", "'translate' has another meaning"),
        ("[models.auto]", "'auto' has another meaning"),
        ('[models.a]\nmodle = "x"', r"\[models.a\]: key 'modle' is unknown. Did you mean 'model'\?"),
        ("[models.a]\ncontext = 12", r"\[models.a\]: context is not usable.*greater than or equal to 256 \(got 12\)"),
        ("[models.a]\nurl = 3", "url is not usable"),
        ("[models.a]\ngpus = 3\npipeline_parallel = 2", "cannot be divided among 2"),
        ("[models.a]\ngpus = 4\ntensor_parallel = 2", "not tensor_parallel times pipeline_parallel"),
        ("[models.a.settings]\napi_port = 3", "key 'api_port' is unknown"),
        ("[models.a.settings]\nengine_port = 3", "key 'engine_port' is unknown"),
        ("[models.a.settings]\nengine_max_ongoin = 3", r"Did you mean 'engine_max_ongoing'\?"),
        ("[models.a]\ncontext = 300\n[models.a.settings]\nmodel_context = 400", "'model_context' is said twice"),
        ("[models.a.adapters]\nb = 3", "b = 3 is no folder"),
        ('[models.a.adapters]\nb = "x"\n[models.b]', "'b' is the name of two things"),
        ('[models.a]\n[tasks]\ntranslat = "a"', r"task 'translat' is unknown. Did you mean 'translate'\?"),
        ('[models.alpha]\n[tasks]\nchat = "alpa"', r"model 'alpa' is unknown. Did you mean 'alpha'\?"),
        ("[models.a]\n[tasks]\nchat = []", "chat = .* is no list of models"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_what_to_do(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(SetupError, match=told) as error:
        fleet(tmp_path, text)
    assert str(tmp_path / "fleet.toml") in error.value.message


def test_an_adapter_without_a_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    spec = fleet(tmp_path, TWO)
    settings = spec.models["large"].settings
    with pytest.raises(SetupError, match="'polite'"):
        checks.check_adapters(settings)
    fleet(
        tmp_path,
        TWO.replace('model = "qwen2.5-coder-0.5b"', 'settings.engine = "scripted"').replace(
            "[models.large.settings]\nengine_max_ongoing = 16", ""
        ),
    )
    checks.check_adapters(settings)


def test_models_must_fit_into_memory_together(tmp_path: Path) -> None:
    settings = Settings(fleet_file=tmp_path / "fleet.toml")
    fleet(tmp_path, TWO.replace("replicas = 2", "replicas = 9999"))
    with pytest.raises(SetupError, match=r"'smollm2-135m', 'qwen2.5-coder-0.5b': 10000 replica"):
        checks.check_memory(settings)


def test_config_for_a_cluster_says_what_differs_and_no_secret(tmp_path: Path) -> None:
    spec = fleet(tmp_path, TWO, internal_token="secret-token")
    text = cluster.serve_config_text(spec, spec.models["small"].settings)
    assert "secret-token" not in text
    small, large = yaml.safe_load(text)["applications"]
    assert small["args"] == {
        "model": "smollm2-135m",
        "engine_replicas": 2,
        "cpu_kv_cache_gib": 0.5,
        "engine_url": "http://127.0.0.1:8100/m/small",
    }
    assert (large["name"], large["route_prefix"]) == ("onebox-large", "/m/large")
    assert large["import_path"] == "serving.deployment:build_app"


def test_the_example_reads() -> None:
    spec = read_fleet(Settings(fleet_file=ROOT / "deploy" / "fleet.example.toml"))
    assert list(spec.models) == ["small", "large"]
