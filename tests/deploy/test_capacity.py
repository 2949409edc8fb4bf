"""The capacity model: the docs have the tables that it prints, and its inputs are measured."""

import dataclasses
import importlib
import re

import pytest

from deploy.capacity import PAGE, Cell, Input, read_inputs, tables
from deploy.routing_simulation import Simulation, Traffic
from onebox.settings import Settings
from tests.bench.__main__ import BENCHMARKS
from tests.product import ROOT


def test_the_tables_of_the_docs_are_what_the_model_prints() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, text in tables().items():
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in page, (
            f"{name} differs: run python -m deploy.capacity --write"
        )


def test_every_measured_input_stands_in_the_benchmarks_section_that_its_source_writes() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name, one in read_inputs().items():
        named = re.fullmatch(r"make bench ARGS=(\S+)", one.source)
        if named is None:
            assert not one.source.startswith("make"), name
            continue
        assert named[1] in BENCHMARKS
        assert importlib.util.find_spec(f"tests.bench.{BENCHMARKS[named[1]]}") is not None
        section = page.partition(f"<!-- {named[1]} -->")[2].partition(f"<!-- /{named[1]} -->")[0]
        (measured,) = re.findall(rf"^\| `{name}` \| (\S+) \|$", section, re.MULTILINE)
        assert one.value == pytest.approx(float(measured), rel=1.0, abs=0.01), f"{name}: measured anew, take it over"


def test_an_input_moves_the_limit_it_belongs_to_and_no_other() -> None:
    inputs = dict(read_inputs())
    before = {limit.name: Cell(inputs).full_at(limit) for limit in Cell(inputs).limits}
    inputs["store_us_per_token"] = Input(inputs["store_us_per_token"].value / 2, "a faster store")
    after = {limit.name: Cell(inputs).full_at(limit) for limit in Cell(inputs).limits}
    assert {name for name in before if before[name] != after[name]} == {"main thread of the store"}
    assert after["main thread of the store"] == pytest.approx(2 * (before["main thread of the store"] or 0), rel=0.2)


def test_logs_kept_for_less_long_take_less_of_the_store() -> None:
    inputs = read_inputs()
    day, short = Cell(inputs), Cell(inputs, Settings(log_keep_s=600))
    assert (day.full_at(day.limits[0]) or 0) * 100 < (short.full_at(short.limits[0]) or 0)
    assert day.size() < short.size()


def test_more_replicas_want_more_gateways_and_none_of_the_parts_less() -> None:
    cell = Cell(read_inputs())
    loads = [cell.load(replicas) for replicas in (1, 10, 100, 1000)]
    one, ten, *many = (load.workers for load in loads)
    assert one <= ten  # there are two workers at least
    assert sorted({ten, *many}) == [ten, *many]
    for limit in cell.limits:
        if limit.name != "connections tracked on a node":  # of which a node has no more when there are more nodes
            shares = [limit.share(load) for load in loads]
            assert shares == sorted(shares), limit.name


@pytest.mark.parametrize("replicas", [4, 16, 64])
def test_conversations_stay_and_no_replica_has_much_more_than_its_part(replicas: int) -> None:
    traffic = Traffic(replicas, gateways=max(2, replicas // 5), places=64, busy_share=0.6, reply_s=8.5)
    by_key = Simulation(traffic, "by key").run()
    assert by_key.same > 0.95
    assert by_key.peak < 1.6
    assert by_key.full < 0.01
    assert Simulation(traffic, "at random").run().same < 0.3
    assert by_key == Simulation(traffic, "by key").run(), "the same seed, the same outcome"
    without = Simulation(traffic, "without a key").run()
    assert without.peak < 1.6, "gateways with the same old roster must not all choose the same door"


def test_traffic_is_what_was_asked_for() -> None:
    traffic = Traffic(replicas=8, gateways=2, places=64, busy_share=0.5, reply_s=8.0)
    busier = dataclasses.replace(traffic, busy_share=1.3)
    assert Simulation(traffic, "by key").run().full < 0.01
    assert Simulation(busier, "by key").run().full > 0.5
