"""`State`: what a graph knows about itself as plain data, in `gm.meta["peft_fx"]`; no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

from torch import fx, nn

from ..config import AdapterConfig
from ..errors import GraphError
from ..planning.plan import Placement, Plan
from ..target import ModuleTable
from .lazy import copy_graph
from .recent import Recent
from .summary import told
from .tensors import ROOT

TRACES = 512  # several times what one adapter takes that has another rank on each layer


class BaseGraph:
    """Holds the base `fx.Graph` inside `gm.meta`; refuses pickling, which would lose tensors, with the remedy.

    traces: what has been traced for graphs derived from it, by signature, configs among it.
    """

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.traces: dict = Recent(TRACES)

    def __deepcopy__(self, memo):
        return BaseGraph(copy_graph(self.graph))

    def __reduce__(self):
        raise GraphError("a captured graph cannot be pickled; write it with peft_fx.export(graph, 'model.pt2')")


@dataclass(frozen=True)
class Resident:
    """A resident adapter: its config, and what that puts where.

    home: stands for the tensors that it is in; the same in all graphs over these, whatever is swapped into them. lowering: the
    form in which its methods enter the graph, "activation" or "weight", or "auto". Of a slot, name: what is in
    it, None while it is free; room: the config of the largest adapter that fits, and of what a free slot holds.
    """

    config: AdapterConfig
    plan: Plan
    lowering: str = "auto"
    name: str | None = None
    room: AdapterConfig | None = None
    home: object = field(default_factory=object, compare=False)

    @cached_property
    def placements(self) -> tuple[Placement, ...]:
        chosen = self.plan.placements
        return chosen if self.lowering == "auto" else tuple(replace(p, lowering=self.lowering) for p in chosen)

    def update(self, **changes) -> Resident:
        return replace(self, **changes)

    def __deepcopy__(self, memo):
        return self.update(config=deepcopy(self.config, memo), home=object())


@dataclass(frozen=True)
class Acted:
    """What acted before a merge: the kept graph, what it was made from besides the base graph, and the passes' reports."""

    graph: fx.Graph
    made_from: tuple
    reports: tuple

    def __deepcopy__(self, memo):
        return self


@dataclass(frozen=True)
class State:
    """Everything a graph module, or a model with adapters, knows about itself, without a tensor.

    recipe: resident adapters in the order they were added. active: those that are set, in order; enabled: whether they act;
    merged: those folded into the weights, in order. acted: what acted before a merge. merge_report: one dict per merged
    target. reports: what the passes did that made this graph. gated: adapters are switched as data; what the recipe and the
    others name are slots then, and callers say what is in them. mixed: each row of a batch chooses among the active adapters.
    aware: packed weights that adapters change are packed again in every forward, as a merge would keep them.
    """

    table: ModuleTable
    base: BaseGraph | None
    range_constraints: dict = field(default_factory=dict)
    recipe: Mapping[str, Resident] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    merged: tuple[str, ...] = ()
    acted: Acted | None = None
    merge_report: tuple[dict, ...] = ()
    reports: tuple = ()
    gated: bool = False
    mixed: bool = False
    aware: bool = False

    def update(self, **changes) -> State:
        return replace(self, **changes)

    @property
    def acting(self) -> tuple[str, ...]:
        """The adapters that are in the graph, in order."""
        return tuple(name for name in self.active if name not in self.merged) if self.enabled else ()

    def placed(self, names: Iterable[str]) -> tuple[Placement, ...]:
        """What these adapters put where, in order."""
        return tuple(p for name in names for p in self.recipe[name].placements)

    @property
    def residents(self) -> dict[str, str]:
        """Adapter name -> where its tensors are: the slot that holds it, its own name on graphs without slots."""
        if not self.gated:
            return {name: name for name in self.recipe}
        return {r.name: slot for slot, r in self.recipe.items() if r.name is not None}

    def called(self, places: Iterable[str]) -> tuple[str, ...]:
        """The names that callers know adapters by, free slots left out."""
        names = {slot: name for name, slot in self.residents.items()}
        return tuple(names[place] for place in places if place in names)


def base_of(state: State) -> BaseGraph:
    """The base of a graph's state: a model's has none."""
    return cast(BaseGraph, state.base)


def state_of(gm: nn.Module, verb: str = "this") -> State:
    """The state of a captured graph. Raises GraphError for anything that `capture` did not make."""
    state = getattr(gm, "meta", {}).get(ROOT) if isinstance(gm, fx.GraphModule) else None
    if state is None:
        raise GraphError(f"{verb} needs a graph made by peft_fx.capture or peft_fx.load, got {told(gm)}")
    return state
