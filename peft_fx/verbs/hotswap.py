"""`hotswap`: other numbers into the same tensors, so that every `torch.compile` guard still holds.

Everything is checked first; then all tensors are written with `copy_` (which raises between forward and backward, as it
should, where `.data.copy_` would corrupt gradients silently). A lower rank is zero-padded into the slot; targets that the
new adapter leaves out get zero factors. Where the adapter is merged, the folded weights are written (`refold`).
"""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import fx, nn

from ..config import AdapterConfig
from ..errors import HotswapError, MergeError, RecipeError
from ..files.keys import of_model
from ..files.match import match_tensors
from ..files.read import read_adapter
from ..methods import get_method
from ..methods.inits import number_of
from ..methods.padding import crop_to, pad_to
from ..planning.kinds import Refusal, one_line_each
from ..planning.plan import Placement, Plan
from ..store import State, state_of
from ..target import sizes
from .adapters import fill
from .derive import planned as plan_of
from .placed import describe
from .refold import refold
from .residual import on_whole_base
from .slots import refuse_taken, slot_for
from .swaps import Swap, SwapReport

WIDEN = "; widen it before compiling with peft_fx.prepare_hotswap(tuned, max_rank=...)"


def hotswap(tuned: fx.GraphModule, path, adapter_name: str = "default") -> SwapReport:
    """Replaces the numbers of a resident adapter by those of another one, in place: 0 recompiles.

    tuned: the graph module from `apply` / `load_adapter`, torch.compile's result for it, or a `load_package`. path: what
    `load_adapter` takes, a pair (config, file key -> tensor), or what `prepare_swap` made of either. Graphs derived from one
    another share the adapter's tensors: all of them see the swap. An optimiser that keeps running keeps the momentum of the
    numbers before: clear its `state`, as for any parameter that is overwritten. On a graph from `reserve` a new
    adapter_name takes a free slot, which stays off until `switch`.

    A merged adapter gives way to one of any method, rank and targets: the weights are folded anew from the kept base. Calls
    in other threads see the old numbers or the new ones, never some of each.

    Raises HotswapError or AdapterFileError, and changes nothing, if Inductor freezing is on, if the new adapter needs
    another method, other targets or a larger rank than the slot has, or, merged, if the merge kept no base weights or the
    new adapter needs other operators: a bias more, no groups, a tie undone.
    """
    start = time.perf_counter()
    gm = getattr(tuned, "_orig_mod", tuned)
    state_of(gm, "hotswap")
    with gm.peft_fx.sharing.swapping():
        state = state_of(gm)
        refuse_freezing()
        if isinstance(path, Swap):
            slot, adapter_name = path.slot, path.adapter
            if state.recipe.get(slot) is not path.resident or slot in state.merged:
                raise HotswapError(
                    f"adapter {adapter_name!r}: this swap was prepared for another graph, or before a merge"
                )
            refuse_taken(state, slot, adapter_name)
        else:
            slot = slot_for(state, adapter_name)
        if slot in state.merged:
            written, padded, zeroed = refolded(gm, state, slot, adapter_name, *read(gm, state, slot, path))
        else:
            slots = slots_of(gm, slot)
            swap = path if isinstance(path, Swap) else swap_of(gm, state, slot, slots, adapter_name, path)
            written, padded, zeroed, path = write(gm, state, slots, swap), swap.padded, swap.zeroed, swap.source
        if state.gated:
            state_of(gm).recipe[slot].name = adapter_name
    elements = sum(t.numel() for t in written)
    source = "memory" if isinstance(path, tuple) else str(path)
    return SwapReport(adapter_name, source, len(written), elements, padded, zeroed, time.perf_counter() - start)


def prepare_swap(tuned: fx.GraphModule, path, adapter_name: str = "default") -> Swap:
    """Reads and checks an adapter for later: `hotswap(tuned, swap)` then is a copy of its numbers.

    Raises what `hotswap` raises, and HotswapError for a merged adapter, whose weights are folded when they are swapped.
    """
    gm = getattr(tuned, "_orig_mod", tuned)
    state = state_of(gm, "prepare_swap")
    slot = slot_for(state, adapter_name)
    if slot in state.merged:
        raise HotswapError(f"adapter {adapter_name!r} is merged: swap it from its folder, or unmerge it first")
    slots = slots_of(gm, slot)
    swap = swap_of(gm, state, slot, slots, adapter_name, path)
    # of the slots' dtype and device, in memory of their own
    values = tuple(v.to(slots[n], copy=True) for n, v in zip(swap.names, swap.values, strict=True))
    return dataclasses.replace(swap, values=values)


def read(gm: fx.GraphModule, state: State, slot: str, path) -> tuple[AdapterConfig, Plan, dict]:
    """An adapter's config, what it puts where, and its numbers by state name."""
    if isinstance(path, tuple):
        (config, tensors), where = path, "what was given"
        tensors = of_model(tensors, state.table)
    else:
        (config, tensors), where = read_adapter(path, state.table), str(path)
    config, tensors = on_whole_base(gm, slot, config, tensors, where)
    plan = planned(state, slot, config)
    return config, plan, match_tensors(plan, tensors, where=where)


def swap_of(gm, state: State, slot: str, slots: dict, name: str, path) -> Swap:
    """The checked swap that makes the slot hold the adapter at `path`; targets that it leaves out become neutral.

    slots: the slot's tensors by state name.
    """
    config, plan, values = read(gm, state, slot, path)
    old, new = by_place(planned(state, slot, state.recipe[slot].config).placements), by_place(plan.placements)
    faults = [
        Refusal(p.target.name, f"the resident adapter has no {p.method} there") for k, p in new.items() if k not in old
    ]
    left_out = [k for k in old if k not in new]
    for p in (old[k] for k in left_out):
        if neutral(p) is None:
            reason = f"the new adapter leaves it out, and {p.method} has no neutral value to put there"
            faults.append(Refusal(p.target.name, reason))
    refuse_faults(name, faults)
    if left_out:
        config = with_targets_of(state.recipe[slot].config, config)
        new = by_place(planned(state, slot, config).placements)
    names, fitting, padded = planned_writes(gm, slot, slots, old, new, values, left_out)
    zeroed = tuple(old[k].target.name for k in left_out)
    source = "memory" if isinstance(path, tuple) else str(path)
    return Swap(name, slot, source, config, names, fitting, padded, zeroed, state.recipe[slot])


def write(gm, state: State, slots: dict, swap: Swap) -> list[torch.Tensor]:
    """Copies a swap's numbers into the graph's tensors, and returns these."""
    written = [slots[name] for name in swap.names]
    with gm.peft_fx.sharing.writing(written), torch.no_grad():
        torch._foreach_copy_(written, list(swap.values))
        state.recipe[swap.slot].config = swap.config
        describe(gm, planned(state, swap.slot, swap.config).placements)
    return written


def refolded(gm, state: State, slot: str, name: str, config, plan: Plan, values: dict):
    """Writes a merged adapter's folded weights; (tensors written, number padded, targets that the new adapter leaves out)."""
    try:
        return refold(gm, state, slot, config, values)
    except (MergeError, RecipeError) as error:
        raise HotswapError(f"adapter {name!r} cannot be swapped in place, nothing was changed: {error}") from error


def refuse_freezing() -> None:
    if torch._inductor.config.freezing:
        raise HotswapError(
            "torch._inductor.config.freezing folds parameters into the compiled code, a swap would have no effect: "
            "turn it off and compile again"
        )


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
    names, writes, padded, newer, numbers = [], [], 0, {}, {}
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
    if name in (values := neutral(p)):
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
    found = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                found[prefix + name] = tensor
        for name, child in module._modules.items():
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
