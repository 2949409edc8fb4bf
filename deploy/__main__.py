"""`python -m deploy up | down | status | top | doctor | settings`."""

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from onebox import logs
from onebox.errors import OneboxError, SetupError
from onebox.settings import PREFIX, Settings, read_settings

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Run Onebox on this machine.")
console = Console()
error_console = Console(stderr=True)
DOWN_TIMEOUT_S = 90.0
SETTINGS_HEAD = """\
# Settings

Every process reads these `ONEBOX_*` variables once, at its start; an unknown one is an error. `make docs` writes this
table from the code.

| variable | default | meaning |
| --- | --- | --- |"""


@app.command()
def up() -> None:
    """Start everything in the foreground; Ctrl-C stops it."""

    def run(settings: Settings) -> None:
        from deploy.launcher import up as launch
        from deploy.screen import Screen

        logs.set_up(settings, "launcher")
        with Screen(console) as screen:
            asyncio.run(launch(settings, screen))

    _guard(run)


@app.command()
def down() -> None:
    """Stop the instance that runs under ONEBOX_HOME."""

    def run(settings: Settings) -> None:
        from deploy import instance

        running = instance.read(settings.home_dir)
        process = running.process() if running else None
        if process is None:
            console.print("Onebox is not running.")
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(DOWN_TIMEOUT_S)
        except psutil.TimeoutExpired:
            process.kill()
        console.print("Stopped.")

    _guard(run)


@app.command()
def status() -> None:
    """Show what runs, and whether it can answer. Exit code 1 when it cannot."""

    def run(settings: Settings) -> None:
        from deploy import instance

        running = instance.read(settings.home_dir)
        if running is None:
            raise SetupError("Onebox is not running. Start it with make up.")
        table = Table("part", "pid", "state", "memory")
        for name, pid in running.children.items():
            table.add_row(name, str(pid), *_process_row(pid))
        console.print(table)
        try:
            ready = httpx.get(f"{running.api_url}/readyz", timeout=10)
        except httpx.HTTPError:
            raise SetupError("The API does not answer. Look at the logs under ONEBOX_HOME/logs.") from None
        if ready.status_code != httpx.codes.OK:
            raise SetupError(
                f"Not ready: {ready.text}. Wait for the model, or look at the logs under ONEBOX_HOME/logs."
            )
        console.print(f"Ready. Page: {running.ui_url}  API: {running.api_url}", highlight=False)

    _guard(run)


@app.command()
def top(
    url: Annotated[str | None, typer.Option(help="The API's address; without it, the one that runs here.")] = None,
    key: Annotated[str | None, typer.Option(help="An API key, where a proxy asks for one.")] = None,
    interval_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option(help="Print one look and end.")] = False,
) -> None:
    """Watch the fleet, the queue and the replies."""

    def run(settings: Settings) -> None:
        from deploy import instance
        from deploy.scrape import Source
        from deploy.top import top as watch

        running = instance.read(settings.home_dir)
        address = url or (running.api_url if running else settings.gateway_url)
        watch(Source(address, key), console, interval_s, once=once)

    _guard(run)


@app.command()
def doctor() -> None:
    """Say what is missing on this machine and what to do. Exit code 1 when something is broken."""

    def run(settings: Settings) -> None:
        from deploy.checks import doctor as findings

        broken = 0
        for finding in findings(settings):
            mark = {"ok": "[green]ok[/green]", "warning": "[yellow]note[/yellow]", "broken": "[red]broken[/red]"}
            console.print(
                f"{mark[finding.state]:>22}  {finding.name}: {finding.detail}", highlight=False, soft_wrap=True
            )
            if finding.advice and finding.state != "ok":
                console.print(f"              {finding.advice}", highlight=False, soft_wrap=True)
            broken += finding.state == "broken"
        if broken:
            raise SetupError(f"{broken} thing(s) to mend; see above.")

    _guard(run)


@app.command()
def settings() -> None:
    """Print the page of all settings, in Markdown (docs/settings.md)."""
    typer.echo(settings_page(), nl=False)


def settings_page() -> str:
    """The text of docs/settings.md."""
    lines = [SETTINGS_HEAD]
    for name, field in Settings.model_fields.items():
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = "unset" if default is None else f"`{default}`"
        lines.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines) + "\n"


def _process_row(pid: int) -> tuple[str, str]:
    try:
        process = psutil.Process(pid)
        return process.status(), f"{process.memory_info().rss / 1024**2:.0f} MB"
    except psutil.Error:
        return "gone", ""


def _guard(run: Callable[[Settings], None]) -> None:
    """Run a command; an error we know is one line and exit code 1."""
    try:
        run(read_settings())
    except OneboxError as error:
        error_console.print(f"onebox: {error.message}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    app()
