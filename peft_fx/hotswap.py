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

from .derive import derived, names_of, placements
from .errors import HotswapError
from .files.match import match_tensors
from .files.read import local_folder, read_config, read_tensors
from .methods import get_method
from .methods.base import pad_to
from .plan import Placement, make_plan
from .store import ADAPTERS, copy_graph, derive, get_tensor, set_tensor, state_of


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
    files. Raises HotswapError or AdapterFileError, and changes nothing, if the adapter is merged, Inductor freezing is
    on, or the new adapter needs another method, other targets or a larger rank than the slot has.
    """
    start = time.perf_counter()
    gm = getattr(tuned, "_orig_mod", tuned)
    state = state_of(gm, "hotswap")
    names_of(state, adapter_name)
    refuse(state, adapter_name)
    folder = local_folder(path)
    config = read_config(folder)
    plan = make_plan(state.table, adapter_name, config)
    values = match_tensors(plan, read_tensors(folder), where=str(path))
    writes, zeroed = planned_writes(gm, state, adapter_name, plan.placements, values)
    written = padded = elements = 0
    with torch.no_grad():
        for slot, value, is_padded in writes:
            slot.copy_(value)
            written, padded, elements = written + 1, padded + is_padded, elements + slot.numel()
    state.recipe[adapter_name].config = config_with_targets(state.recipe[adapter_name].config, config, zeroed)
    return SwapReport(adapter_name, str(path), written, elements, padded, tuple(zeroed), time.perf_counter() - start)


def refuse(state, adapter: str) -> None:
    if adapter in state.merged:
        raise HotswapError(f"adapter {adapter!r} is merged: its tensors are not in the graph; unmerge first")
    if torch._inductor.config.freezing:
        raise HotswapError(
            "torch._inductor.config.freezing folds parameters into the compiled code, a swap would have no effect: "
            "turn it off and compile again"
        )


def planned_writes(gm, state, adapter: str, new: tuple[Placement, ...], values: dict):
    """[(slot, value, padded)] and the targets to be zeroed; raises HotswapError before anything is written."""
    resident = {p.target.name: p for p in placements(state, adapter)}
    incoming = {p.target.name: p for p in new}
    faults = [f"{name}: not a target of the resident adapter" for name in incoming if name not in resident]
    writes, zeroed = [], []
    for name, old in resident.items():
        p = incoming.get(name)
        if p is None:
            neutral = get_method(old.method).neutral(old.target, old.config)
            if neutral is None:
                faults.append(f"{name}: the new adapter leaves it out, and {old.method} has no neutral value to put there")
                continue
            zeroed.append(name)
            writes += [(slot_of(gm, old, n), torch.full((), v), False) for n, v in neutral.items()]
            continue
        if (p.method, set(p.tensors), input_dropout(p)) != (old.method, set(old.tensors), input_dropout(old)):
            faults.append(f"{name}: method, tensors or dropout differ from the resident adapter's ({old.method})")
            continue
        for n, spec in p.tensors.items():
            if n in p.shared:
                continue
            slot = slot_of(gm, old, n)
            if spec.key is not None:
                value = values[p.state_name(n)]
            else:
                value = torch.empty(spec.shape, dtype=slot.dtype, device=slot.device)
                spec.init(value, None)
            fits = fitted(value, slot, spec.pad)
            if fits is None:
                faults.append(f"{name}.{n}: shape {tuple(spec.shape)} does not fit the slot {tuple(slot.shape)}; "
                              "widen it before compiling with peft_fx.prepare_hotswap(tuned, max_rank=...)")  # fmt: skip
                continue
            writes.append((slot, fits, fits.shape != value.shape))
    if faults:
        shown = "\n  ".join(faults[:5])
        raise HotswapError(f"adapter {adapter!r} cannot be swapped in place, nothing was changed:\n  {shown}" + (
            f"\n  ... and {len(faults) - 5} more" if len(faults) > 5 else ""))  # fmt: skip
    return writes, zeroed


def input_dropout(p: Placement) -> float:
    return get_method(p.method).input_dropout(p.target, p.config)


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


def config_with_targets(old, new, zeroed):
    """The resident config after a swap: the new one; it keeps choosing the old targets if some of them were only zeroed."""
    if not zeroed:
        return new
    selectors = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
    return dataclasses.replace(new, **{name: getattr(old, name) for name in selectors})


def prepare_hotswap(tuned: fx.GraphModule, *, max_rank: int) -> fx.GraphModule:
    """Widens every slot to `max_rank` with zeros, before compiling, so that adapters of any rank up to it can be swapped in.

    Returns a new graph with new adapter Parameters: build the optimiser after this. Outputs do not change. Raises
    HotswapError if a resident adapter's rank is larger.
    """
    state = state_of(tuned, "prepare_hotswap")
    new = derive(tuned, copy_graph(state.base.graph), state)
    for adapter, resident in state.recipe.items():
        wide = {p.target.name: p for p in make_plan(state.table, adapter, resident.config.with_rank(max_rank)).placements}
        for p in placements(state, adapter):
            for name, spec in p.tensors.items():
                if not spec.pad or name in p.shared:
                    continue
                full = f"{ADAPTERS}.{p.state_name(name)}"
                tensor = get_tensor(new, full)
                shape = tuple(wide[p.target.name].tensors[name].shape)
                padded = fitted(tensor.detach(), torch.empty(shape, device="meta"), spec.pad)
                if padded is None:
                    raise HotswapError(f"{p.target.name}.{name}: shape {tuple(tensor.shape)} is larger than max_rank={max_rank}")
                set_tensor(new, full, nn.Parameter(padded.clone(), requires_grad=tensor.requires_grad))
    return derived(new, state)
