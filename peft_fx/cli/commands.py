"""The commands as typer sees them: names, options and help. What they need is imported when they run: torch takes a second."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from .terminal import stdout

# of `inspect`, one module as_* each -> whether it draws the graph itself
FORMATS = {"table": False, "code": True, "json": False, "dot": True}


def known_format(name: str) -> str:
    if name not in FORMATS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(FORMATS)}")
    return name


Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="What to apply: a .json or .yaml file, JSON itself, or a method's name for its defaults. "
        "[dim]e.g. --recipe lora, --recipe tune.yaml, "
        '--recipe \'{"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}\'[/]',
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="An adapter in PEFT's files, or its hub id; its config alone is read. [dim]e.g. --adapter runs/sql-lora[/]",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="Show the graph around one target, before and after: the end of its name, or a regex for all of it. Of "
        "several that match, the first. [dim]e.g. --target layers.0.self_attn.q_proj, --target '.*down_proj'[/]",
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="|".join(FORMATS),
        callback=known_format,
        help="table; code: the graph as Python; json: see above; dot: for Graphviz, adapters in green. "
        "[dim]e.g. --target q_proj --format dot | dot -Tsvg > q_proj.svg[/]",
    ),
]
Every = Annotated[
    bool, typer.Option("--all", help="List every layer's targets, not one line for all layers. [dim]e.g. --all[/]")
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a config.json, a hub id, or a .pt2 written by peft_fx.export. Weights are not loaded, code that "
        "comes with a model is not run. [dim]e.g. HuggingFaceTB/SmolLM2-135M[/]",
    ),
]


def inspect(
    model: Source,
    recipe: Recipe = None,
    adapter: Adapter = None,
    target: Target = None,
    format: Format = "table",
    every: Every = False,
) -> None:
    """Show a model's targets, and what a recipe or an adapter does to them.

    Without --recipe and --adapter: every parameter that could be adapted, or, for a .pt2, the adapters in it. A config whose
    modules say that by themselves is not traced for it; what a graph would add (nodes, mode, lowering, reason) is left out.

    [bold]--format json[/] prints one object; keys may be added, none changes:

    [cyan]format[/]   1
    [cyan]model[/]    source, name, parameters, dtypes, mode, weights
    [cyan]targets[/]  adapter, target, kind, shape, storage, method, lowering, parameters, status, reason, rounding_error
    [cyan]passes[/]   name, changed, seconds, before, after, difference
    [cyan]totals[/]   targets, refused, unmatched, parameters_added, nodes_before, nodes_after
    [cyan]target[/]   null; with --target: name, matches, and before and after, lists of nodes:
             name, op, target, args, kwargs, dtype, shape, tag, inserted ("%x" in args is the node x)

    A target's status is planned, active, resident, merged, refused, unmatched (names nothing), or possible.
    What is wrong with the input is said in one line on stderr, with exit code 2.
    """
    if recipe is not None and adapter is not None:
        raise typer.BadParameter("--recipe and --adapter exclude each other: an adapter brings its own config")
    from .gathering import gather

    inspection = gather(model, recipe, adapter, target, FORMATS[format])
    import_module(f".as_{format}", __package__).show(inspection, stdout(), every)


Name = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="One method, with all that is known of it. [dim]e.g. vera[/]"),
]


Storage = Annotated[
    bool,
    typer.Option(
        "--storage", help="What each method can do on quantized weights, and what PEFT can. [dim]e.g. --storage[/]"
    ),
]
Method = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="With --storage: one method, step by step. [dim]e.g. --method oft[/]"),
]
Scheme = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="With --storage: one storage, step by step. [dim]e.g. --scheme gptq[/]"),
]


def methods(name: Name = None, storage: Storage = False, method: Method = None, scheme: Scheme = None) -> None:
    """List the methods and what each can do; with NAME: its formulas, options and file keys.

    Everything is asked of the code: which operator kinds a method takes on a probe, and in which form. What --storage shows
    was run: every method on every storage, step by step.
    """
    if storage:
        from .storages import show as show_storages

        return show_storages(name or method, scheme, stdout())
    if method is not None or scheme is not None:
        raise typer.BadParameter("--method and --scheme go with --storage")
    from .methods import show

    show(name, stdout())
