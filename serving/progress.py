"""How a long job tells its caller how far it is; drawing the bar is the launcher's job."""

from typing import Literal, Protocol

Stage = Literal["download", "verify", "convert"]


class Report(Protocol):
    """Called from time to time; `done` and `total` are bytes, `total` is None while unknown."""

    def __call__(self, stage: Stage, done: int, total: int | None) -> None: ...


def quiet(stage: Stage, done: int, total: int | None) -> None:
    """A `Report` that nobody sees."""
