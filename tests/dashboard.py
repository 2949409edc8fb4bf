"""The Grafana dashboard's expressions, for the tests that hold them against what is exported."""

import json
import re

from tests.processes import ROOT

DASHBOARD = ROOT / "deploy" / "grafana" / "onebox.json"


def expressions() -> list[str]:
    """The PromQL of every panel."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def names(expression: str, prefix: str) -> set[str]:
    """The metrics in an expression whose names begin so."""
    return set(re.findall(rf"\b{prefix}\w+", expression))
