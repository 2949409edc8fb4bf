from collections.abc import Iterator

import pytest

from tests.product import Product, product

SCRIPTED = {"ONEBOX_ENGINE": "scripted", "ONEBOX_SCRIPTED_ITL_MS": "1"}


@pytest.fixture(scope="session")
def scripted_product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """The whole product on the scripted engine, shared by the session."""
    with product(tmp_path_factory.mktemp("up"), SCRIPTED) as started:
        yield started
