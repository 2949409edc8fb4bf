"""Benchmarks that feed the capacity model: their figures go into the docs and into `deploy/capacity.toml`."""

import re
from collections.abc import Mapping

from deploy.capacity import INPUTS
from tests.bench import report


def table(figures: Mapping[str, float]) -> str:
    """The figures for the docs, named as the model names them; those that it reads are written where it reads them."""
    text = INPUTS.read_text(encoding="utf-8")
    for name, value in figures.items():
        text = re.sub(rf"(?m)^(\[{name}\]\nvalue = )\S+$", rf"\g<1>{value:.3g}", text)
    INPUTS.write_text(text, encoding="utf-8")
    return report.table(
        ("input of the capacity model", "measured"), [(f"`{n}`", f"{v:.3g}") for n, v in figures.items()]
    )
