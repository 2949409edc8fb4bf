from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.product import Product, product

SCRIPTED = {"ONEBOX_ENGINE": "scripted", "ONEBOX_SCRIPTED_ITL_MS": "1"}


@pytest.fixture(scope="package")
def scripted_product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """The whole product on the scripted engine, shared by this folder."""
    with product(tmp_path_factory.mktemp("up"), SCRIPTED) as started:
        yield started


@pytest.fixture(scope="module")
def real_product(tmp_path_factory: pytest.TempPathFactory, test_home: Path) -> Iterator[Product]:
    """The whole product on vLLM with the small English model, shared by a module."""
    home = tmp_path_factory.mktemp("real")
    (test_home / "models").mkdir(parents=True, exist_ok=True)
    (home / "models").symlink_to(test_home / "models")
    with product(home, {"ONEBOX_MODEL": "smollm2-135m", "ONEBOX_MODEL_CONTEXT": "2048"}) as started:
        yield started
