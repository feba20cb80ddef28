"""`--format code`: the graph as Python that reads well; `+` marks what adapters added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from .facts import Inspection
from .labels import labels_of
from .nodes import Node, Ref

THEME = "ansi_dark"


def show(inspection: Inspection, console: Console, expand: bool) -> None:
    view = inspection.view
    if view.target is None:
        print_code(console, view.after)
        return
    title(console, view.target, view.matches)
    if not view.changed:
        print_code(console, view.after)
        return
    console.print("[dim]# before[/]")
    print_code(console, view.before)
    console.print("\n[dim]# after[/]")
    print_code(console, view.after)


def title(console: Console, target: str, matches: int) -> None:
    others = f"  [dim](first of {matches} that match)[/]" if matches > 1 else ""
    console.print(f"[dim]#[/] [bold]{target}[/]{others}")


def print_code(console: Console, nodes: Sequence[Node]) -> None:
    """Long lines are left to the terminal, so that what is copied is whole."""
    lines = [line(n, labels) for labels in [labels_of(nodes)] for n in nodes]
    syntax = Syntax("", "python", theme=THEME, background_color="default")
    coloured = syntax.highlight("\n".join(lines)).split("\n")
    marks: Iterable[Text] = (Text("+ ", "green") if n.inserted else Text("  ") for n in nodes)
    for mark, text in zip(marks, coloured, strict=False):
        console.print(mark + text, soft_wrap=True)


def line(n: Node, labels: dict[str, str]) -> str:
    return WRITERS[n.op](n, labels) if n.op in WRITERS else f"{labels[n.name]} = {n.op}({n.target})"


def placeholder(n: Node, labels: dict[str, str]) -> str:
    return f"{annotated(n, labels)} = inputs[{n.target!r}]"


def attribute(n: Node, labels: dict[str, str]) -> str:
    return f"{annotated(n, labels)} = {dotted(n.target)}"


def dotted(path: str) -> str:
    """`self.model.layers[0].mlp`"""
    return "self" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))


def call(n: Node, labels: dict[str, str]) -> str:
    return (
        f"{annotated(n, labels)} = {n.target if n.op == 'call_function' else dotted(n.target)}({arguments(n, labels)})"
    )


def method(n: Node, labels: dict[str, str]) -> str:
    return f"{annotated(n, labels)} = {text(n.args[0], labels)}.{n.target}({arguments(n, labels, skip=1)})"


def output(n: Node, labels: dict[str, str]) -> str:
    return f"return {text(n.args[0], labels)}"


WRITERS = {
    "placeholder": placeholder, "get_attr": attribute, "call_function": call, "call_module": call,
    "call_method": method, "output": output,
}  # fmt: skip


def annotated(n: Node, labels: dict[str, str]) -> str:
    return f"{labels[n.name]}: {n.type}" if n.type else labels[n.name]


def arguments(n: Node, labels: dict[str, str], skip: int = 0) -> str:
    return ", ".join(
        [*(text(a, labels) for a in n.args[skip:]), *(f"{k}={text(v, labels)}" for k, v in n.kwargs.items())]
    )


def text(value: Any, labels: dict[str, str]) -> str:
    if isinstance(value, Ref):
        return labels.get(value.name, value.name)
    if isinstance(value, list):
        return f"[{', '.join(text(v, labels) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {text(v, labels)}' for k, v in value.items())}}}"
    return repr(value)
