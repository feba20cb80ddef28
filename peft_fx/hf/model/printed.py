"""A Tuner as text: the model, and a line per adapter."""

from __future__ import annotations

from textwrap import indent
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tuner import Tuner


def printed(tuner: Tuner) -> str:
    lines = [f"(model): {tuner.model}", *(f"({name}): {described(tuner, name)}" for name in tuner.names)]
    return f"{tuner._get_name()}(\n{indent(chr(10).join(lines), '  ')}\n)"


def described(tuner: Tuner, name: str) -> str:
    state = tuner.state
    found = [p.target.name for p in state.recipe[name].placements]
    does = "merged" if name in state.merged else "acts" if name in state.acting else "does not act"
    tree = tuner.adapters._modules.get(name)
    tensors = [] if tree is None else list(tree.parameters())
    count, trained = sum(p.numel() for p in tensors), sum(p.numel() for p in tensors if p.requires_grad)
    targets = f"{len(found)} targets ({' ... '.join(dict.fromkeys((*found[:1], *found[-1:])))})"
    return f"{tuner.peft_config[name].peft_type}, {does}, on {targets}, {count:,} parameters, {trained:,} trainable"
