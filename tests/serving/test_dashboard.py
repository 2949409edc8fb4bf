"""What the dashboard asks of vLLM is there, also where Ray's own port shows it too."""

import httpx
import pytest

from tests.dashboard import expressions, names
from tests.serving.wire import Wire


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.faults
@pytest.mark.parametrize("wire", ["vllm-haproxy"], indirect=True)
def test_every_metric_of_vllm_on_the_dashboard_is_exported_by_vllm(wire: Wire) -> None:
    headers = {"authorization": f"Bearer {wire.token}"}
    page = httpx.get(f"{wire.url}/metrics", headers=headers, trust_env=False).text
    declared = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")}
    used = {name.removesuffix("_bucket") for expression in expressions() for name in names(expression, "vllm:")}
    assert used
    assert used - declared == set()
