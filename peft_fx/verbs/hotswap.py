"""`hotswap`: other numbers into the same tensors, so that every `torch.compile` guard still holds.

Everything is checked first; then all tensors are written with `copy_` (which raises between forward and backward, as it
should, where `.data.copy_` would corrupt gradients silently). A lower rank is zero-padded into the slot; targets that the
new adapter leaves out get zero factors.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..errors import HotswapError, RecipeError
from ..files.match import match_tensors
from ..files.read import local_folder, read_config, read_tensors
from ..methods import get_method
from ..methods.base import crop_to, pad_to
from ..planning.plan import Placement, Plan, make_plan
from ..store import ADAPTERS, Resident, derive, get_tensor, set_tensor, state_of
from .adapters import initialise
from .derive import derived, names_of, placements, refuse_merged

WIDEN = "; widen it before compiling with peft_fx.prepare_hotswap(tuned, max_rank=...)"


@dataclass(frozen=True)
class SwapReport:
    """What a swap wrote. padded: tensors smaller than their slot. zeroed: targets that the new adapter leaves out."""

    adapter: str
    source: str
    tensors: int
    elements: int
    padded: int
    zeroed: tuple[str, ...]
    seconds: float


def hotswap(tuned: fx.GraphModule, path, adapter_name: str = "default") -> SwapReport:
    """Replaces the numbers of a resident adapter by those of another one, in place: 0 recompiles.

    tuned: the graph module from `apply` / `load_adapter`, or torch.compile's result for it. path: a folder with PEFT's
    files. Graphs derived from one another share the adapter's tensors: all of them see the swap. An optimiser that keeps
    running keeps the momentum of the numbers before: clear its `state`, as for any parameter that is overwritten.

    Raises HotswapError or AdapterFileError, and changes nothing, if the adapter is merged, Inductor freezing is on, or
    the new adapter needs another method, other targets or a larger rank than the slot has.
    """
    start = time.perf_counter()
    gm = getattr(tuned, "_orig_mod", tuned)
    state = state_of(gm, "hotswap")
    names_of(state, adapter_name)
    refuse(state, adapter_name)
    folder = local_folder(path)
    config = read_config(folder)
    plan = planned(state, adapter_name, config)
    values = match_tensors(plan, read_tensors(folder), where=str(path))
    old, new = by_place(placements(state, adapter_name)), by_place(plan.placements)
    faults = [f"{p.target.name}: the resident adapter has no {p.method} there" for k, p in new.items() if k not in old]
    left_out = [k for k in old if k not in new]
    for p in (old[k] for k in left_out):
        if neutral(p) is None:
            faults.append(
                f"{p.target.name}: the new adapter leaves it out, and {p.method} has no neutral value to put there"
            )
    refuse_faults(adapter_name, faults)
    if left_out:
        config = with_targets_of(state.recipe[adapter_name].config, config)
        new = by_place(planned(state, adapter_name, config).placements)
    writes = planned_writes(gm, adapter_name, old, new, values, left_out)
    with torch.no_grad():
        for slot, value, _ in writes:
            slot.copy_(value)
    state.recipe[adapter_name].config = config
    return SwapReport(
        adapter_name, str(path), len(writes), sum(slot.numel() for slot, _, _ in writes), sum(p for _, _, p in writes),
        tuple(old[k].target.name for k in left_out), time.perf_counter() - start,
    )  # fmt: skip


def refuse(state, adapter: str) -> None:
    if adapter in state.merged:
        raise HotswapError(f"adapter {adapter!r} is merged: its tensors are not in the graph; unmerge first")
    if torch._inductor.config.freezing:
        raise HotswapError(
            "torch._inductor.config.freezing folds parameters into the compiled code, a swap would have no effect: "
            "turn it off and compile again"
        )


def planned(state, adapter: str, config) -> Plan:
    try:
        return make_plan(state.table, adapter, config)
    except RecipeError as error:
        raise HotswapError(f"adapter {adapter!r} cannot be swapped in place, nothing was changed: {error}") from error


def by_place(chosen: tuple[Placement, ...]) -> dict[tuple[str, str], Placement]:
    """(method, parameter) -> placement: one adapter can put several methods on one parameter."""
    return {(p.method, p.target.name): p for p in chosen}


def planned_writes(gm, adapter: str, old: dict, new: dict, values: dict, left_out: list) -> list:
    """[(slot, value, padded)] that make the slots of `old` hold `new`; raises HotswapError before anything is written."""
    faults = [f"{old[k].target.name}: the new config has no place for it" for k in old if k not in new]
    writes, newer = [], {}
    for place, p in new.items():
        was = old[place]
        if (set(p.tensors), p.shared, input_dropout(p)) != (set(was.tensors), was.shared, input_dropout(was)):
            faults.append(f"{p.target.name}: tensors, ties or dropout differ from the resident adapter's")
            continue
        if literals(p) != literals(was):
            faults.append(f"{p.target.name}: the resident graph was made for {literals(was)}, not for {literals(p)}")
            continue
        for name, spec in p.tensors.items():
            if name in p.shared:
                continue
            slot = slot_of(gm, p, name)
            value = neutral_value(p, name, slot) if place in left_out else values.get(p.state_name(name))
            if value is None:
                value = torch.empty(spec.shape, dtype=slot.dtype, device=slot.device)
                initialise(value, gm, p, spec, newer)
            newer[p.state_name(name)] = value
            fits = fitted(value, slot, spec.pad)
            if fits is None:
                fault = f"{p.target.name}.{name}: shape {tuple(spec.shape)} does not fit the slot {tuple(slot.shape)}"
                faults.append(fault + (WIDEN if spec.pad else ""))
                continue
            writes.append((slot, fits, fits.shape != value.shape))
    refuse_faults(adapter, faults)
    return writes


def refuse_faults(adapter: str, faults: list[str]) -> None:
    if faults:
        more = [f"... and {len(faults) - 5} more"] if len(faults) > 5 else []
        lines = [f"adapter {adapter!r} cannot be swapped in place, nothing was changed:", *faults[:5], *more]
        raise HotswapError("\n  ".join(lines))


def neutral(p: Placement) -> dict[str, float] | None:
    return get_method(p.method).neutral(p.target, p.config)


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


def input_dropout(p: Placement) -> float:
    return get_method(p.method).input_dropout(p.target, p.config)


def literals(p: Placement) -> tuple:
    return get_method(p.method).literals(p.target, p.config)


def slot_of(gm, p: Placement, name: str) -> torch.Tensor:
    return get_tensor(gm, f"{ADAPTERS}.{p.resolve(name).name}")


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


def prepare_hotswap(tuned: fx.GraphModule, *, max_rank: int) -> fx.GraphModule:
    """Widens every slot to `max_rank` with zeros, before compiling, so that adapters of any rank up to it can be swapped in.

    Returns a new graph with adapter tensors of its own: build the optimiser after this. Outputs do not change. Raises
    HotswapError if a resident adapter's rank is larger.
    """
    state = state_of(tuned, "prepare_hotswap")
    refuse_merged(state, "prepare_hotswap")
    state = state.update(recipe={name: Resident(r.config) for name, r in state.recipe.items()})
    new = derive(tuned, fx.Graph(), state)
    for adapter, resident in state.recipe.items():
        wide = by_place(planned(state, adapter, resident.config.with_rank(max_rank)).placements)
        for place, p in by_place(placements(state, adapter)).items():
            for name, spec in p.tensors.items():
                if name in p.shared:
                    continue
                tensor = slot_of(tuned, p, name)
                shape = wide[place].tensors[name].shape if spec.pad else tuple(tensor.shape)
                padded = fitted(tensor.detach(), torch.empty(shape, device="meta"), spec.pad)
                if padded is None:
                    raise HotswapError(
                        f"{p.target.name}.{name}: shape {tuple(tensor.shape)} is larger than max_rank={max_rank}"
                    )
                own = padded.clone()
                if isinstance(tensor, nn.Parameter):
                    own = nn.Parameter(own, requires_grad=tensor.requires_grad)
                set_tensor(new, f"{ADAPTERS}.{p.state_name(name)}", own)
    return derived(new, state)
