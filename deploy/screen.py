"""What the person who typed `up` reads: one line per step, bars for downloads."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from serving.progress import Stage

STAGES: dict[Stage, str] = {
    "download": "Downloading the model",
    "verify": "Checking the model",
    "convert": "Preparing the model",
}


class Screen:
    """Prints steps with the seconds since the start; `report` is a `serving.progress.Report`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = time.monotonic()
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._stages: dict[Stage, TaskID] = {}

    def step(self, text: str) -> None:
        """One line, with the time since the start."""
        self.console.print(
            f"[dim]{time.monotonic() - self._started:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True
        )

    def say(self, text: str) -> None:
        """One line without a time."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def report(self, stage: Stage, done: int, total: int | None) -> None:
        """Show how far a stage of the model's preparation is, in bytes."""
        if stage not in self._stages:
            label = STAGES[stage]
            self.step(f"{label} …")
            self._stages[stage] = self._bars.add_task(label, total=total)
        self._bars.update(self._stages[stage], completed=done, total=total)

    def __enter__(self) -> "Screen":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
