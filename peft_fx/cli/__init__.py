"""The `peft-fx` command. One module per job: `commands`, `model` (what to open), `gathering` (what is asked), `facts`,
`graphs`, `views`, `nodes` and `method_facts` (what is shown, as data), `as_*` and `methods` (one way to show it each),
`terminal` (streams and errors)."""

from __future__ import annotations

import gc
from importlib.metadata import version
from typing import Annotated

import typer

from .commands import inspect, methods
from .terminal import OneLineErrors

app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="rich")
app.command("inspect")(inspect)
app.command("methods")(methods)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-fx {version('peft-fx')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def peft_fx(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Print the version. [dim]e.g. --version[/]"
        ),
    ] = False,
) -> None:
    """Parameter-efficient fine-tuning by rewriting torch.fx graphs.

    Example: [bold]peft-fx inspect HuggingFaceTB/SmolLM2-135M --recipe lora[/]
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Runs without garbage collection: its sweeps are a fifth of a short process's time and find next to nothing, also the
    one that the interpreter makes at the end, which sees nothing of what is frozen."""
    gc.disable()
    try:
        app()
    finally:
        gc.freeze()


__all__ = ["app", "main"]
