"""Fetches the model of the settings ahead of a start: for the launcher, and for images as a command.

    python -m serving.fetch [auto|ALIAS|PATH|HUB_ID]

How it is fetched is in `serving.download`, which model it is in `serving.models`.
"""

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from onebox.errors import SetupError
from onebox.settings import Settings, read_settings
from serving.models import ResolvedModel, memory_gib, resolve
from serving.progress import Report, Stage, quiet

__all__ = ["ensure", "memory_gib"]


def ensure(settings: Settings, report: Report = quiet) -> ResolvedModel:
    """The model of the settings, present on this disk; several processes may call this at once.

    Raises:
        SetupError: it is unknown or cannot be fetched.
    """
    return resolve(settings, report)


def main(model: str = typer.Argument("auto", help="Alias of the catalogue, local path, hub id, or auto.")) -> None:
    """Fetch a model into ONEBOX_HOME/models and print its folder."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[Stage, TaskID] = {}

        def report(stage: Stage, done: int, total: int | None) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        try:
            resolved = ensure(read_settings(model=model), report)
        except SetupError as error:
            progress.stop()
            typer.echo(error.message, err=True)
            raise typer.Exit(1) from None
    typer.echo(resolved.path)


if __name__ == "__main__":
    typer.run(main)
