"""What a captured graph module carries besides the model: one submodule, `gm.peft_fx`, and plain data in `gm.meta`.

    gm.peft_fx.adapters.<adapter>.<target>.<tensor>    parameters and buffers of the resident adapters
    gm.peft_fx.gates.<adapter>                         how much of an adapter acts, where a graph switches them as data
    gm.peft_fx.replaced.<target>                       weights that a merge replaced, for unmerge (not in state_dict)
    gm.peft_fx.mode(train_value, eval_value)           literals that differ between train() and eval()
    gm.peft_fx.device()                                the device the captured literals mean
    gm.peft_fx.inputs(x, ...)                          checks what capture fixed of a call: constants, sizes
    gm.peft_fx.sharing                                 the lock between calls and swaps, for all graphs over the same tensors
    gm.meta["peft_fx"]: State                          module table, recipe, active adapters, base fx.Graph; no tensors

A GraphModule subclass would be lost by the next pass; a submodule and `meta` are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from .config import AdapterConfig
from .errors import GraphError
from .inputs import FixedInputs
from .lazy import copy_graph
from .resident import Adapters
from .sharing import Shared, Sharing
from .summary import told
from .target import ModuleTable

ROOT = "peft_fx"
ADAPTERS = f"{ROOT}.adapters"
REPLACED = f"{ROOT}.replaced"
GATES = f"{ROOT}.gates"
MODE = f"{ROOT}.mode"
DEVICE = f"{ROOT}.device"
INPUTS = f"{ROOT}.inputs"
PRESERVED = "_user_preserved_attributes"  # torch.fx: attributes named here survive deepcopy though no node reads them


class ByMode(nn.Module):
    """Chooses between a training and an evaluation literal, so that `train()` / `eval()` work on a captured graph.

    locked: why the graph has only one mode; leaving that mode then raises GraphError.
    """

    def __init__(self, training: bool, locked: str = ""):
        super().__init__()
        self.training, self.locked = training, locked

    def forward(self, train_value, eval_value):
        return train_value if self.training else eval_value

    def train(self, mode: bool = True):
        if self.locked and mode != self.training:
            wanted, has = ("train", "eval") if mode else ("eval", "train")
            raise GraphError(f"this graph has no {wanted} mode, it was captured in {has} mode only: {self.locked}")
        return super().train(mode)


class ByDevice(nn.Module):
    """The device on which the graph creates tensors: that of `anchor`, which `.to(device)` moves with the weights."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.register_buffer("anchor", torch.empty(0, device=device), persistent=False)

    def forward(self):
        return self.anchor.device


class Store(nn.Module):
    """Root of everything above. First child of its graph module, so that it can refuse before anything is converted."""

    def __init__(self, mode: ByMode, device: ByDevice):
        super().__init__()
        self.training = mode.training
        self.mode, self.device, self.inputs = mode, device, FixedInputs()
        self.adapters, self.gates, self.replaced = Adapters(), nn.Module(), nn.Module()
        self.sharing = Sharing()

    def train(self, mode: bool = True):
        self.mode.train(mode)  # first, since it may refuse
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        if fn(torch.empty(0, dtype=torch.float32)).dtype != torch.float32:
            raise GraphError(
                "the dtype of a captured graph cannot be changed: casts such as x.float() are literals in it. "
                "Cast the model, e.g. model.to(torch.bfloat16), and capture it again"
            )
        return super()._apply(fn, recurse)


class BaseGraph:
    """Holds the base `fx.Graph` inside `gm.meta`; refuses pickling, which would lose tensors, with the remedy.

    traces: what has been traced for graphs derived from it, by signature.
    """

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.traces: dict = {}

    def __deepcopy__(self, memo):
        return BaseGraph(copy_graph(self.graph))

    def __reduce__(self):
        raise GraphError("a captured graph cannot be pickled; write it with peft_fx.export(graph, 'model.pt2')")


@dataclass
class Resident:
    """A resident adapter's config, shared by all graphs derived from one another, since they share its tensors.

    lowering: the form in which its methods enter the graph, "activation" or "weight", or "auto". Of a slot, name: what is in
    it, None while it is free; room: the config of the largest adapter that fits, and of what a free slot holds.
    """

    config: AdapterConfig
    lowering: str = "auto"
    name: str | None = None
    room: AdapterConfig | None = None


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
    """Everything a graph module knows about itself, without a tensor.

    recipe: resident adapters in the order they were added. active: those in the graph, in order. merged: those folded
    into the weights, in order; before_merge: what was active then; acted: its graph. merge_report: one dict per merged
    target. reports: what the passes did that made this graph. gated: adapters are switched as data; what the recipe and the
    others name are slots then, and callers say what is in them. mixed: each row of a batch chooses among the active adapters.
    """

    table: ModuleTable
    base: BaseGraph
    range_constraints: dict = field(default_factory=dict)
    recipe: dict[str, Resident] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    before_merge: tuple[str, ...] = ()
    acted: Acted | None = None
    merge_report: tuple[dict, ...] = ()
    reports: tuple = ()
    gated: bool = False
    mixed: bool = False

    def update(self, **changes) -> State:
        return replace(self, **changes)

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


def state_of(gm: nn.Module, verb: str = "this") -> State:
    """The state of a captured graph. Raises GraphError for anything that `capture` did not make."""
    state = getattr(gm, "meta", {}).get(ROOT) if isinstance(gm, fx.GraphModule) else None
    if state is None:
        raise GraphError(f"{verb} needs a graph made by peft_fx.capture or peft_fx.load, got {told(gm)}")
    return state


def set_graph(gm: fx.GraphModule, graph: fx.Graph) -> None:
    """Gives `gm` a graph without generating its code: whoever runs passes on it does that once, at the end."""
    gm._graph = graph
    graph.owning_module = gm


def build(
    modules: dict[str, nn.Module], parameters: dict, buffers: dict, graph: fx.Graph, state: State
) -> fx.GraphModule:
    """A GraphModule that owns the given root entries (objects, not copies); it runs `graph` once passes have run on it."""
    gm = Shared(nn.Module(), fx.Graph(), class_name="GraphModule")
    for name, module in modules.items():
        gm.add_module(name, module)
    for name, parameter in parameters.items():
        gm.register_parameter(name, parameter)
    for name, (buffer, persistent) in buffers.items():
        gm.register_buffer(name, buffer, persistent=persistent)
    set_graph(gm, graph)
    gm.meta[ROOT] = state
    gm.meta[PRESERVED] = {name: getattr(gm, name) for name in (ROOT, "_non_persistent_buffers_set")}
    gm.training = gm.peft_fx.mode.training
    return gm


def derive(gm: fx.GraphModule, graph: fx.Graph, state: State) -> fx.GraphModule:
    """A new GraphModule over the same tensors with its own module objects, graph, mode and state."""
    copies: dict[nn.Module, nn.Module] = {}
    modules = {name: shell(module, copies) for name, module in gm._modules.items()}
    modules = {ROOT: modules.pop(ROOT), **modules}
    buffers = {n: (b, n not in gm._non_persistent_buffers_set) for n, b in gm._buffers.items()}
    if not hasattr(modules[ROOT], "sharing"):  # another tool's pass rebuilt the containers
        modules[ROOT].sharing = Sharing()
    new = build(modules, dict(gm._parameters), buffers, graph, state)
    new.peft_fx.sharing.add(gm, new)
    return new


def shell(module: nn.Module, copies: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A module tree of new objects that hold the same tensors; sub-graphs of regions are copied too.

    copies: what has been copied already, so that a module under two names stays one module.
    """
    copies = {} if copies is None else copies
    if module in copies:
        return copies[module]
    if isinstance(module, fx.GraphModule):
        new = fx.GraphModule(module, copy_graph(module.graph))
        new.training = module.training
        return new
    new = copies[module] = module.__new__(type(module))
    new.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        new.__dict__[kind] = dict(module.__dict__[kind])
    new.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    new.__dict__["_modules"] = {
        name: shell(child, copies) for name, child in module._modules.items() if child is not None
    }
    return new


def owner_of(root: nn.Module, name: str, create: bool = False) -> tuple[nn.Module, str]:
    """The module that holds the dotted `name`, and the last component; `create` adds missing containers."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            if not create:
                raise GraphError(f"the graph module has no {name!r}")
            child = nn.Module()
            child.training = root.training
            module.add_module(part, child)
        module = module._modules[part]
    return module, leaf


def get_tensor(root: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer called `name`, or None."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        module = module._modules.get(part)
        if module is None:
            return None
    return module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)


def set_tensor(root: nn.Module, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:
    """Registers `tensor` under `name`: a Parameter as parameter, anything else (and non-persistent) as buffer."""
    owner, leaf = owner_of(root, name, create=True)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    if isinstance(tensor, nn.Parameter) and persistent:
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)
