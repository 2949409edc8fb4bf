"""What the page knows of learning, over the fake gateway."""

from collections.abc import AsyncIterator

import pytest

from onebox.client import Client
from onebox.errors import Internal
from onebox.labels import Label, LabelState
from onebox.messages import user
from tests.ui.conftest import Fake
from ui.learning import Learnt

LABEL = LabelState(Label("label_1", 1.0, "reroute", (user("Hello"),), ("qa",), ("chat",), run_id="resp_1")).to_json()


@pytest.fixture
async def client(fake: Fake) -> AsyncIterator[Client]:
    async with Client(fake.url, "key") as client:
        yield client


async def test_label_that_is_gone_already_counts_as_undone(client: Client, fake: Fake) -> None:
    fake.gateway.learning, fake.gateway.labels = "tenant", [LABEL]
    learnt = Learnt(client)
    await learnt.look()
    assert learnt.labels == {"resp_1": "label_1"}
    fake.gateway.labels = []
    await learnt.undo("label_1")
    assert learnt.labels == {}


async def test_box_ticked_off_and_on_learns_for_whom_it_did(client: Client, fake: Fake) -> None:
    learnt = Learnt(client)

    async def chosen(*, on: bool) -> str:
        await learnt.choose(on=on)
        assert learnt.learning == fake.gateway.learning
        return fake.gateway.learning

    assert await chosen(on=True) == "tenant"
    fake.gateway.learning = "global"  # chosen elsewhere: the page has not looked since
    assert await chosen(on=False) == "off"
    assert await chosen(on=True) == "global"


@pytest.mark.parametrize(("learning", "labels"), [("sometimes", []), ("tenant", [{"id": "label_1"}])])
async def test_answer_of_an_unknown_form_leaves_the_page_without_learning(
    client: Client, fake: Fake, learning: str, labels: list[dict[str, object]]
) -> None:
    fake.gateway.learning, fake.gateway.labels = learning, labels
    learnt = Learnt(client)
    await learnt.look()
    assert learnt.learning is None
    assert learnt.labels == {}


async def test_client_calls_a_label_or_choice_of_an_unknown_form_an_internal_error(client: Client, fake: Fake) -> None:
    fake.gateway.learning, fake.gateway.labels = "sometimes", [{"id": "label_1"}]
    with pytest.raises(Internal, match="not of the form"):
        await client.labels.learning()
    with pytest.raises(Internal, match="not of the form"):
        await client.labels.page()
