"""Graph nodes as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..target import sizes


@dataclass(frozen=True)
class Ref:
    """Another node's name among a node's arguments."""

    name: str


class Word(str):
    """What stands in code without quotes: dtypes, symbolic sizes, infinity."""

    __repr__ = str.__str__


@dataclass(frozen=True)
class Node:
    """args, kwargs: literals, lists of them, and `Ref`s. tag: what peft_fx wrote on the node."""

    name: str
    op: str
    target: str
    args: tuple
    kwargs: dict
    dtype: str
    shape: tuple
    tag: dict
    inserted: bool

    @property
    def inputs(self) -> list[str]:
        return list(dict.fromkeys(refs((self.args, tuple(self.kwargs.values())))))

    @property
    def type(self) -> str:
        """`float32[8, 576]`, `float32` for a scalar, "" for what is no tensor."""
        return self.dtype + (sizes(self.shape) if self.shape else "")


@dataclass(frozen=True)
class View:
    """Nodes before and after adapters. target: what is shown, None for the whole graph. matches: how many were meant."""

    target: str | None = None
    matches: int = 0
    before: tuple[Node, ...] = ()
    after: tuple[Node, ...] = ()

    @property
    def changed(self) -> bool:
        return any(n.inserted for n in self.after)


def refs(value: Any) -> list[str]:
    if isinstance(value, Ref):
        return [value.name]
    if isinstance(value, dict):
        value = list(value.values())
    return [name for v in value for name in refs(v)] if isinstance(value, (list, tuple)) else []
