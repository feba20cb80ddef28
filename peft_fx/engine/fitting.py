"""Whether an adapter fits the tensors of another, and the numbers that it puts into them."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..errors import HotswapError, RecipeError
from ..methods import get_method
from ..methods.inits import number_of
from ..methods.padding import crop_to, pad_to
from ..planning.kinds import Refusal, one_line_each
from ..planning.plan import Placement, Plan
from ..target import sizes
from .adding import fill
from .transitions import planned as plan_of

WIDEN = "; widen it before compiling with peft_fx.prepare_hotswap(tuned, max_rank=...)"


def planned(state, adapter: str, config) -> Plan:
    try:
        return plan_of(state, adapter, config)
    except RecipeError as error:
        raise HotswapError(f"adapter {adapter!r} cannot be swapped in place, nothing was changed: {error}") from error


def by_place(chosen: tuple[Placement, ...]) -> dict[tuple[str, str], Placement]:
    """(method, parameter) -> placement: one adapter can put several methods on one parameter."""
    return {(p.method, p.target.name): p for p in chosen}


def planned_writes(gm, adapter: str, slots: dict, old: dict, new: dict, values: dict, left_out: list) -> tuple:
    """(names, values, number padded) that make the slots of `old` hold `new`. Raises HotswapError where that cannot be."""
    faults = [Refusal(old[k].target.name, "the new config has no place for it") for k in old if k not in new]
    names, writes, padded, numbers = [], [], 0, {}
    newer: dict[str, torch.Tensor] = {}
    for place, p in new.items():
        was = old[place]
        if p is not was and shape_of(p) != shape_of(was):
            faults.append(Refusal(p.target.name, "tensors, ties or dropout differ from the resident adapter's"))
            continue
        if p is not was and literals(p) != literals(was):
            reason = f"the resident graph was made for {literals(was)}, not for {literals(p)}"
            faults.append(Refusal(p.target.name, reason))
            continue
        for name, spec in p.tensors.items():
            if name in p.shared:
                continue
            state_name = p.state_name(name)
            slot = slots[state_name]
            value = neutral_value(p, name, slot) if place in left_out else values.get(state_name)
            if value is None and (number := number_of(spec.init)) is not None:
                # the same few for most targets
                key = number, spec.shape, slot.dtype, slot.device
                if key not in numbers:
                    numbers[key] = torch.full(spec.shape, number, dtype=slot.dtype, device=slot.device)
                value = numbers[key]
            elif not isinstance(value, torch.Tensor):
                made = torch.empty(spec.shape, dtype=slot.dtype, device=slot.device)
                fill(made, gm, p, name, value, newer)
                value = made
            newer[state_name] = value
            fits = fitted(value, slot, spec.pad)
            if fits is None:
                fault = f"shape {sizes(spec.shape)} does not fit the slot {sizes(slot.shape)}"
                reason = get_method(p.method).one_size
                fixed = f"; with {p.method} a smaller adapter does not fit a larger slot: {reason}" if reason else ""
                faults.append(Refusal(f"{p.target.name}.{name}", fault + (WIDEN if spec.pad else fixed)))
                continue
            names.append(state_name)
            writes.append(fits)
            padded += fits is not value
    refuse_faults(adapter, faults)
    return tuple(names), tuple(writes), padded


def refuse_faults(adapter: str, faults: list[Refusal]) -> None:
    if faults:
        found = one_line_each(faults)
        more = [f"... and {len(found) - 5} more"] if len(found) > 5 else []
        lines = [f"adapter {adapter!r} cannot be swapped in place, nothing was changed:", *found[:5], *more]
        raise HotswapError("\n  ".join(lines))


def neutral(p: Placement) -> dict[str, float] | None:
    return p.rule.neutral(p.target, p.config)


def neutral_value(p: Placement, name: str, slot: torch.Tensor) -> torch.Tensor | None:
    """What a target that the new adapter leaves out gets: its neutral value, else its own numbers cut to the new rank.

    None for what is computed from the config.
    """
    spec, shape = p.tensors[name], p.tensors[name].shape
    if name in (values := neutral(p) or {}):
        return slot.new_full(shape, values[name])
    if spec.key is None:
        return None
    larger = any(size > have for size, have in zip(shape, slot.shape, strict=True))
    return slot.new_empty(shape) if larger else crop_to(slot.detach(), shape, spec.pad).clone()  # the first is refused


def shape_of(p: Placement) -> tuple:
    """What of a placement the graph's structure depends on, besides sizes and literals."""
    return set(p.tensors), p.shared, p.rule.input_dropout(p.target, p.config)


def literals(p: Placement) -> tuple:
    return p.rule.literals(p.target, p.config)


def slots_of(gm, adapter: str) -> dict[str, torch.Tensor]:
    """State name -> tensor of a resident adapter. One walk over its modules, where a look-up per name is one each."""
    found: dict[str, torch.Tensor] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found[prefix + name] = tensor
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    visit(gm.peft_fx.adapters._modules[adapter], f"{adapter}.")
    return found


def fitted(value: torch.Tensor, slot: torch.Tensor, pad: tuple) -> torch.Tensor | None:
    """`value` padded with zeros to the slot's shape; None if it does not fit."""
    if value.shape == slot.shape:
        return value
    grows = {axis % slot.dim() for axis, _ in pad}
    if value.dim() != slot.dim() or any(
        v > s or (v < s and axis not in grows) for axis, (v, s) in enumerate(zip(value.shape, slot.shape, strict=True))
    ):
        return None
    return pad_to(value, tuple(slot.shape), pad)


def with_targets_of(old, new):
    """The new config on the old targets, for when some of them were only made neutral."""
    selectors = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
    return dataclasses.replace(new, **{name: getattr(old, name) for name in selectors})
