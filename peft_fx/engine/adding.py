"""One more adapter over the tensors of a graph module: its plan, its tensors, their first numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import fx, nn

from ..config import AdapterConfig, refuse_to_begin
from ..errors import AdapterFileError, RecipeError, UnmatchedWarning
from ..files.match import match_tensors
from ..methods.base import HALF, Tensor
from ..notices import warn
from ..passes.forms.lowering import to_canonical
from ..planning.plan import Placement
from ..planning.selection import completed
from ..storage.packed import Packed
from ..store.modules import derive
from ..store.state import state_of
from ..store.tensors import ADAPTERS, ROOT, kept_of, tensor_of, weight_of
from ..target import ModuleTable, Target
from .derive import frozen, replicated
from .placed import describe, put
from .residual import on_whole_base
from .trainable import refuse_part
from .transitions import addable, added, refuse_slots, resident_of

LOWERINGS = ("auto", "activation", "weight")


class Source(NamedTuple):
    """Numbers for a new adapter: file key -> tensor, and where they are from.

    drawn: its tensors are initialised nevertheless, as PEFT's are, so that the generator goes on as it does there.
    partial: what is missing starts as without numbers, what does not belong to the adapter is left.
    """

    tensors: dict[str, torch.Tensor]
    where: str
    drawn: bool = False
    partial: bool = False


def with_adapter(gm, name: str, config: AdapterConfig, source, trainable: bool, activate: bool,
                 lowering: str = "auto", deeper: bool = False) -> fx.GraphModule:  # fmt: skip
    """A graph module with one more resident adapter, not yet derived. source: what `Source` takes, None for initial values.

    deeper: the model has the layers of the config's layer_replication already.
    """
    state = state_of(gm, "apply")
    config = own = completed(state.table, config)
    if lowering not in LOWERINGS:
        raise RecipeError(f"lowering={lowering!r}: expected one of {LOWERINGS}")
    refuse_slots(state, "adding an adapter", "peft_fx.hotswap(graph, path, name) puts one into a free slot")
    if source is None:
        refuse_to_begin(config)
    addable(state, name, config)
    gm = derive(gm, fx.Graph(), state) if state.recipe else frozen(gm)
    if config.layer_replication and not deeper:
        gm = replicated(gm, config.layer_replication)
        state = state_of(gm)
    source = source and Source(*source)
    if source is not None and trainable:
        refuse_part(config, source.where)
    if source is not None:
        config, tensors = on_whole_base(gm, name, config, source.tensors, source.where)
        if trainable and config is not own:
            warn(
                f"adapter {name!r} began with a part of the base weight, and is LoRA of twice the rank here: what it began with "
                "is trained too, which PEFT keeps"
            )
        source = source._replace(tensors=tensors)
    resident = resident_of(state, name, config, lowering)
    plan, new = resident.plan, added(state, name, resident, activate)
    for entry in plan.unmatched:
        warn(f"adapter {name!r}: {entry}", UnmatchedWarning)
    for advice in dict.fromkeys(p.rule.advice(p.target, p.config) for p in plan.placements):
        if advice:
            warn(f"adapter {name!r}: {advice}")
    if not config.ensure_weight_tying and not any(r.config.layer_replication for r in new.recipe.values()):
        warn_of_ties(name, plan.placements, state.table)
    values = source and match_tensors(plan, source.tensors, where=source.where, partial=source.partial)
    for placement in plan.placements:
        allocate(gm, placement, values, trainable, source is not None and source.drawn)
    gm.meta[ROOT] = new
    return gm


def warn_of_ties(adapter: str, placements: Iterable[Placement], table: ModuleTable) -> None:
    """Warns of an adapter that takes a weight away from those that are tied to it; trained tokens stay tied."""
    names = (p.target.name for p in placements if p.method != "TOKENS")
    if found := next(((name, others) for name in names if (others := table.tied_to(name))), None):
        warn(
            f"adapter {adapter!r}: {found[0]} is tied to {', '.join(found[1])}, which does not change with it: files and merged "
            "models are no longer tied. LoRA, modules_to_save and tokens keep ties with ensure_weight_tying=True"
        )


def allocate(gm: fx.GraphModule, placement: Placement, values: dict | None, trainable: bool, drawn=False) -> None:
    """Registers a placement's tensors, initialised or from a file; `drawn`: one after the other."""
    base = kept_of(gm, placement.target.name)
    device = offloaded_to(gm.get_submodule(placement.target.path)) if base.device.type == "meta" else None
    for name, spec in placement.tensors.items():
        if name in placement.shared:
            continue
        tensor = empty_tensor(spec, base, device)
        state_name = placement.state_name(name)
        value = (values or {}).get(state_name)
        if drawn and value is not None and base.device.type != "meta":
            fill(tensor, gm, placement, name, None, {})
        fill(tensor, gm, placement, name, value, {})
        grad = trainable and tensor.is_floating_point()
        put(gm, placement, name, nn.Parameter(tensor, requires_grad=grad) if spec.trainable else tensor)
    describe(gm, [placement])


@torch.no_grad()
def fill(tensor: torch.Tensor, gm: fx.GraphModule, placement: Placement, name: str, value, newer: dict) -> None:
    """Writes a tensor's numbers: those of a file, whole or in pieces, or where it starts if `value` is None.

    newer: state name -> what will take the place of the adapter's own tensors. Raises AdapterFileError for pieces that do
    not fit.
    """
    spec = placement.tensors[name]
    if value is None:
        weights = [base_weight(gm, t) for t in spec.sources or (placement.target,)]
        spec.init(tensor, weights if spec.sources else weights[0], *values_of(gm, placement, spec.needs, newer))
        if spec.trainable and weights[0].dtype in HALF:  # PEFT makes it in that dtype first
            tensor.copy_(tensor.to(weights[0].dtype))
    elif spec.pieces is None:
        tensor.copy_(value)
    elif fault := spec.pieces.join(tensor, value, *values_of(gm, placement, spec.needs, newer)):
        raise AdapterFileError(f"{placement.file_key(name)}: {fault}")


def values_of(gm: fx.GraphModule, placement: Placement, tensors: tuple[str, ...], newer: dict) -> list[torch.Tensor]:
    """The values of some of a placement's tensors."""
    names = [placement.resolve(n).name for n in tensors]
    return [newer[n] if n in newer else tensor_of(gm, f"{ADAPTERS}.{n}").detach() for n in names]


def base_weight(gm: fx.GraphModule, target: Target) -> torch.Tensor:
    """A target's weight in canonical layout; for one expert of a stack, its own."""
    W = weight_of(gm, target.tensor_name).detach()
    return to_canonical(W if target.expert is None else W[target.expert], target)


def empty_tensor(spec: Tensor, base: torch.Tensor | Packed, device=None) -> torch.Tensor:
    """Memory for one tensor of an adapter of the weight `base`, where that is unless a device is given."""
    return torch.empty(spec.shape, dtype=spec.dtype_on(base.dtype), device=base.device if device is None else device)


def offloaded_to(module: nn.Module):
    """The device to which accelerate brings a module's weights for a call; None if it does not."""
    hook = getattr(module, "_hf_hook", None)
    devices = [getattr(h, "execution_device", None) for h in getattr(hook, "hooks", (hook,))]
    return next((d for d in devices if d is not None), None)
