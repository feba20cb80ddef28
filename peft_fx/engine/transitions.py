"""Transitions: one `State` -> the next. Pure; each has its checks and messages here, for verbs and face alike.

A transition says what is so from now on. What has to happen for it, a graph derived anew or numbers written, its executor
does first; `publish` makes it known. Nothing has changed where one of them raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from torch import fx

from ..config import AdapterConfig
from ..errors import AdapterNameError, GraphError, MergeError, RecipeError, TargetError, WrongTypeError
from ..planning.kinds import one_line_each
from ..planning.plan import Placement, Plan, clashes, make_plan
from ..store.state import Resident, State, state_of
from ..store.tensors import ROOT, store_of
from ..suggestions import did_you_mean

NO_MATTER = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")  # to a plan


def resident_of(state: State, place: str, config: AdapterConfig, lowering: str = "auto", **of_slot) -> Resident:
    """An adapter that is going to be at `place`. Raises RecipeError as `make_plan` does."""
    return Resident(config, planned(state, place, config), lowering, **of_slot)


def planned(state: State, place: str, config: AdapterConfig) -> Plan:
    """What a config puts where at `place`: the plan of the adapter that is there, if it is planned alike."""
    there = state.recipe.get(place)
    return (
        there.plan
        if there is not None and planned_alike(there.config, config)
        else make_plan(state.table, place, config)
    )


def planned_alike(a: AdapterConfig, b: AdapterConfig) -> bool:
    known = {f.name for f in fields(a)}
    return a is b or (type(a) is type(b) and a == replace(b, **{n: getattr(a, n) for n in NO_MATTER if n in known}))


def names_of(state: State, names: str | Iterable[str]) -> tuple[str, ...]:
    """Adapter names as a tuple, of slots those of the slots. Raises AdapterNameError for one that is not resident."""
    resident = state.residents
    there = ", ".join(resident) or "none"
    if not isinstance(names, Iterable):
        raise AdapterNameError(f"expected an adapter's name or a list of names, got {names!r}; resident: {there}")
    chosen = (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        if not isinstance(name, str):
            raise WrongTypeError(f"adapter names are strings, got {name!r}; resident: {there}")
        if name not in resident:
            raise AdapterNameError(f"there is no adapter {name!r}; resident: {there}{did_you_mean(name, resident)}")
    if len(set(chosen)) != len(chosen):
        raise AdapterNameError(f"adapter names are repeated: {list(chosen)}")
    return tuple(resident[name] for name in chosen)


def addable(state: State, place: str, config: AdapterConfig) -> None:
    """Raises RecipeError or GraphError where there can be no such adapter."""
    refuse_merged(state, "adding an adapter")
    if place in state.recipe:
        raise RecipeError(f"there is an adapter {place!r} already; give another adapter_name, or use peft_fx.hotswap")
    only_one_with_biases(state, place, config)


def added(state: State, place: str, resident: Resident, activate: bool) -> State:
    addable(state, place, resident.config)
    active = (*state.active, place) if activate else state.active
    return state.update(recipe={**state.recipe, place: resident}, active=active)


def only_one_with_biases(state: State, place: str, config: AdapterConfig) -> None:
    other = next((n for n, r in state.recipe.items() if r.config.bias != "none" and n != place), None)
    if other and config.bias != "none":
        raise RecipeError(
            f"adapters {other!r} and {place!r} both train biases (bias={config.bias!r}); only one of them can"
        )


def activated(state: State, names: str | Iterable[str]) -> State:
    """Exactly these are set, in order. Raises TargetError for some that each bring their own numbers for one weight."""
    refuse_merged(state, "set_adapter")
    places = names_of(state, names)
    refuse_clashes(state.placed(places), TargetError)
    return state.update(active=places)


def enabled(state: State, on: bool) -> State:
    """Whether what is set acts."""
    return state.update(enabled=on)


def merged(state: State, places: Iterable[str], report: Iterable[dict], **kept) -> State:
    """These are in the weights, behind those that are already. kept: `acted`."""
    return state.update(merged=(*state.merged, *places), merge_report=tuple(report), **kept)


def mergeable(state: State, places: tuple[str, ...]) -> None:
    """Raises MergeError for adapters that cannot be folded, or not together with those that are."""
    if not places:
        raise MergeError("nothing to merge: no adapter is active; name one, or call set_adapter")
    chosen = state.placed((*state.merged, *places))
    for p in chosen:
        if reason := p.rule.no_weight:
            raise MergeError(f"{p.target.name}: refused: {p.method} cannot be merged: {reason}")
    refuse_clashes(chosen, MergeError)


def refuse_clashes(chosen: Iterable[Placement], kind: type[Exception]) -> None:
    """Raises `kind` for adapters that each bring their own numbers for one weight."""
    if found := clashes(chosen):
        raise kind("\n  ".join(["these adapters cannot act together: take one of them", *one_line_each(found)]))


def unmerged(state: State) -> State:
    """The weights are the base's again."""
    if not state.merged:
        raise MergeError("nothing to unmerge: no adapter is merged")
    return state.update(merged=(), merge_report=())


def deleted(state: State, place: str) -> State:
    """An adapter less; of a slot, its adapter less."""
    refuse_merged(state, "delete_adapter")
    if state.gated:
        return swapped(state, place, emptied(state, place))
    recipe = {n: r for n, r in state.recipe.items() if n != place}
    return state.update(recipe=recipe, active=tuple(n for n in state.active if n != place))


def swapped(state: State, place: str, resident: Resident) -> State:
    """Another adapter in the place of one."""
    return state.update(recipe={**state.recipe, place: resident})


def emptied(state: State, slot: str) -> Resident:
    """A free slot for what fits into this one."""
    resident = state.recipe[slot]
    room = resident.room or resident.config
    return resident_of(state, slot, room, resident.lowering, room=room)


def refuse_merged(state: State, verb: str) -> None:
    if state.mixed:
        raise GraphError(f"{verb} on a graph for mixed batches: use the graph that peft_fx.mixed_batch made it from")
    if state.merged:
        raise GraphError(
            f"{verb} on a merged graph ({', '.join(state.called(state.merged))}): unmerge it first with "
            "peft_fx.unmerge(graph)"
        )


def refuse_slots(state: State, verb: str, instead: str) -> None:
    if state.gated:
        raise GraphError(f"{verb} on a graph with slots: {instead}, or use the graph that peft_fx.reserve made it from")


def publish(gm: fx.GraphModule, place: str, new: Resident) -> None:
    """Another adapter's numbers are in these tensors: all graphs over them know."""
    home = state_of(gm).recipe[place].home
    new = new.update(home=home)
    for graph in {gm, *store_of(gm).sharing.all()}:
        state = state_of(graph)
        if place in state.recipe and state.recipe[place].home is home:
            graph.meta[ROOT] = swapped(state, place, new)
