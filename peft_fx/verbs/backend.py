"""`backend`: the adapters as a backend of torch.compile, for models that are not captured: caches, `generate`, graph breaks.

    tuned = torch.compile(model, backend=peft_fx.backend(recipe, model=model, inner="inductor"))

Plan and tensors come from the module tree, ahead of any call. Dynamo's graphs take the model's parameters as inputs and one
graph may serve several modules, so each call looks at which parameters it gets and passes the adapters of these along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import checkpoint

from ..atomic import StrPath
from ..config import AdapterConfig
from ..engine.adding import with_adapter
from ..engine.inplace import MODEL
from ..engine.python_parts import as_written, compiled_module, give_frames, of_torch, used_by
from ..engine.swaps import SwapReport
from ..engine.transitions import activated, deleted, names_of, publish, resident_of
from ..errors import GraphError, RecipeError
from ..files.read import read_adapter
from ..notices import warn
from ..passes.core.base import regions
from ..passes.core.splice import TRACING, signature
from ..passes.dynamo.adapt import CHECKPOINT, adapt
from ..passes.dynamo.products import options_with
from ..planning.modules import module_table
from ..planning.plan import Placement
from ..recipe import Recipe, as_recipe
from ..storage.packed import weight_name
from ..storage.twins import opened, stand_in
from ..store.modules import ByDevice, ByMode, Store, build
from ..store.recent import Recent
from ..store.sharing import Shared
from ..store.state import TRACES, BaseGraph, State, state_of
from ..store.tensors import ROOT, get_tensor, packed_of, store_of, tensor_of
from ..store.unwrap import unwrapped
from .adapters import save_adapter
from .capture.model import skeleton
from .hotswap import hotswap

RECIPE_FILES = (".json", ".yaml", ".yml")
RUNS = 64  # compiled for one of Dynamo's graphs with adapters of other kinds


def backend(
    recipe: Any,
    *,
    model: nn.Module | None = None,
    inner: str | Callable = "eager",
    adapter_name: str = "default",
    trainable: bool = True,
    lowering: str = "auto",
) -> Backend:
    """A backend for `torch.compile` or `model.compile` that puts adapters into Dynamo's graphs.

    recipe: what `apply` takes, or what `load_adapter` does. model: what is going to be compiled, on its device;
    left out, it is found at the first call, and has no adapters until then. inner: the backend that gets the adapted graphs:
    "eager", "aot_eager", "inductor", or any other of Dynamo's. trainable: whether adapters from files require grad.
    lowering: as for `apply`.

    The base's parameters get no gradients and keep their requires_grad. Functions that Dynamo leaves to Python (graph breaks
    in loops) and that use a target themselves are refused where they are noticed; fullgraph=True makes sure.
    """
    new = Backend(sources(recipe, adapter_name), inner, trainable, lowering)
    return new if model is None else new.attach(model)


class Backend:
    """Adapters of one model, and a callable for torch.compile.

    wanted: per adapter its name, config, and (file's tensors, where) or None for initial values; without a config, where
    its files are.
    """

    __name__ = "peft_fx"  # Dynamo's messages call backends by it

    def __init__(
        self, wanted: Iterable[tuple], inner: str | Callable = "eager", trainable: bool = True, lowering: str = "auto"
    ):
        self.wanted, self.trainable, self.lowering = tuple(wanted), trainable, lowering
        self.inner = inner
        self.model: nn.Module | None = None
        self._adapters: Shared | tuple[Store, State] | None = None
        self.read: set[str] = set()  # targets that some graph reads
        self.changes = 0  # adapters deleted, whose names may come again with other tensors, or configured anew
        self.complete = False

    def __repr__(self) -> str:
        adapters = ", ".join(f"{n}: {c.peft_type if c else 'as its file says'}" for n, c, _ in self.wanted)
        return f"Backend(adapters=[{adapters}], model={None if self.model is None else type(self.model).__name__})"

    def attach(self, model: nn.Module, frames: bool = True, deeper: bool = False) -> Backend:
        """Plans the adapters for `model` and makes their tensors. Raises RecipeError as `apply` does.

        frames: give torch's modules with targets frames that Dynamo can compile (`give_frames`). deeper: the model has the layers
        of the configs' layer_replication already.
        """
        model = unwrapped(model)
        if ROOT in model._modules:
            raise GraphError("this is a captured graph: peft_fx.apply(graph, recipe) puts adapters in")
        if self.model is not None and self.model is not model:
            raise GraphError(
                f"this backend holds the adapters of another {type(self.model).__name__}: make one for each model"
            )
        if self.model is None:
            gm: fx.GraphModule = without_graph(model)
            for name, config, source in self.wanted:
                if config is None:  # files: only the model's table says what those of other programs mean
                    config, tensors = read_adapter(source, state_of(gm).table)
                    source = (tensors, str(source))
                if config.layer_replication and not deeper:
                    raise RecipeError("layer_replication changes the model, not its graphs: capture the model for it")
                trainable = not config.inference_mode if source is None else self.trainable
                gm = with_adapter(gm, name, config, source, trainable, True, self.lowering, deeper)
            self.model, self.frames = model, frames
            self.keep(gm)
            self.open(self.acting())
            if frames:
                stand_in(model)
        return self

    def keep(self, gm: fx.GraphModule) -> None:
        """From now on the adapters are those of `gm`."""
        self._adapters = without_graph(self.attached, store_of(gm), state_of(gm))

    def become(self, state: State) -> None:
        """Other adapters act from now on."""
        self.adapters.meta[ROOT] = state

    def add(self, name: str, config: AdapterConfig, source: tuple | None = None, trainable: bool = True) -> None:
        """One more adapter, which does not act yet. source: what `Source` takes; None: it starts as its method does.

        Raises RecipeError and AdapterFileError as `apply` and `load_adapter` do; nothing has changed then.
        """
        if config.layer_replication:
            raise RecipeError(
                f"layer_replication changes the base model and has to come with its first adapter: leave it out for {name!r}, "
                "which is planned on the model as it is now"
            )
        self.keep(with_adapter(self.adapters, name, config, source, trainable, activate=False))
        self.open(self.state.recipe[name].placements)

    def open(self, chosen: Iterable[Placement]) -> None:
        if self.frames:
            give_frames(filter(of_torch, (self.attached.get_submodule(p.target.path) for p in chosen)))

    def delete(self, name: str) -> None:
        """Raises GraphError for a name that no adapter has."""
        (place,) = names_of(self.state, name)
        self.adapters.meta[ROOT] = deleted(self.state, place)
        self.adapters.peft_fx.adapters._modules.pop(place, None)
        self.changes += 1

    def configure(self, name: str, **fields: Any) -> None:
        """Other values in an adapter's config, of fields that no tensor of it depends on."""
        state = self.state
        resident = state.recipe[name]
        publish(self.adapters, name, resident_of(state, name, replace(resident.config, **fields), resident.lowering))
        self.changes += 1

    @property
    def attached(self) -> nn.Module:
        """The model, once `attach` has been given one."""
        return cast(nn.Module, self.model)

    @property
    def state(self) -> State:
        return state_of(self.adapters)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act, in order."""
        return self.state.acting

    def owners(self) -> set[nn.Module]:
        """The modules that own targets."""
        return {self.attached.get_submodule(p.target.path) for p in self.acting()}

    @property
    def adapters(self) -> Shared:
        """The model's tree with the adapters beside it and no operators: what save_adapter and hotswap take."""
        if self._adapters is None:
            raise GraphError("this backend has no model yet: peft_fx.backend(recipe, model=model), or .attach(model)")
        if isinstance(self._adapters, tuple):
            self._adapters = without_graph(self.attached, *self._adapters)
        return self._adapters

    def __getstate__(self) -> dict:
        """For copies and pickles: the adapters alone; the tree of the model's tensors is made again when it is asked for."""
        gm = self._adapters
        kept = (gm.peft_fx, state_of(gm).update(base=None)) if isinstance(gm, Shared) else gm
        return {**self.__dict__, "_adapters": kept}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapters' parameters, named <adapter>.<module>.on_<parameter>.<tensor>."""
        return self.adapters.peft_fx.adapters.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapters' parameters, for an optimiser."""
        return (p for _, p in self.named_parameters())

    def save_adapter(self, path: StrPath, adapter_name: str | None = None) -> Path:
        return save_adapter(self.adapters, path, adapter_name)

    def hotswap(self, path: Any, adapter_name: str = "default") -> SwapReport:
        """Other numbers into the same tensors: every compiled graph has them at once, none is compiled again."""
        return hotswap(self.adapters, path, adapter_name)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Which adapters act, in order; () for none. Graphs are adapted anew where these have not acted yet."""
        self.adapters.meta[ROOT] = activated(self.state, names)

    def acting_now(self) -> tuple[tuple[str, ...], bool]:
        """The adapters that act in the call of this thread, and whether behind gates: of the snapshot that it took, if it did."""
        call = self.adapters.peft_fx.sharing.call()
        return (self.active, False) if call is None or call.seen is None else (call.seen.names, call.seen.gated)

    def acting(self) -> tuple[Placement, ...]:
        """What is adapted now, in order."""
        return self.state.placed(self.state.acting)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence, **options: Any) -> Callable:
        """For Dynamo: its graph and inputs -> what runs instead. options: torch.compile's mode and options."""
        if self.model is None:
            if (model := compiled_module()) is None:
                raise GraphError("which model is being compiled? Say so: peft_fx.backend(recipe, model=model)")
            self.attach(model)
        self.refuse_python()
        return Adapted(self, gm, inputs, self.compiler(options))

    def compiler(self, options: dict) -> Callable:
        if self.inner == "eager":
            return eager
        if self.inner == "inductor":
            chosen = options_with(options.get("mode"), options.get("options"))
            return torch._TorchCompileInductorWrapper(None, chosen, None)
        compiler: Callable = lookup_backend(self.inner)
        return (lambda gm, inputs: compiler(gm, inputs, **options)) if options else compiler

    def names(self) -> dict[int, tuple[str, ...]]:
        """id of a tensor of the model -> its names, one per module."""
        found: dict[int, tuple[str, ...]] = {}
        for record in state_of(self.adapters).table.records:
            for name in (*record.parameters, *record.buffers):
                full = f"{record.path}.{name}" if record.path else name
                packed = packed_of(self.adapters, full)
                tensors = {full: get_tensor(self.attached, full)} if packed is None else packed.named(full)
                for own, tensor in tensors.items():
                    found[id(tensor)] = (*found.get(id(tensor), ()), own)
        return found

    def refuse_python(self) -> None:
        """Raises GraphError if a function that uses targets runs in Python at this moment."""
        written = as_written()
        owners = {m for m in self.owners() if not of_torch(m)} if written else set()
        for path, module in self.attached.named_modules():
            if module in written and not owners.isdisjoint(used_by(module)):
                raise GraphError(
                    f"Dynamo left the forward of {path or 'the model'} to Python, where no adapter acts: rewrite what "
                    "fullgraph=True names, or leave its parameters out of the recipe"
                )

    def check_complete(self) -> None:
        """Warns once of targets that no graph reads, when some graph runs for the second time."""
        self.complete = True
        targets = dict.fromkeys(p.target.name for p in self.acting())
        if unread := [name for name in targets if name not in self.read]:
            warn(
                f"{len(unread)} of {len(targets)} targets, first {unread[0]}, are in no graph of Dynamo's so far: the model did "
                "not use them, or Dynamo left their module to Python, where no adapter acts: compile with fullgraph=True to see"
            )


@dataclass
class Variant:
    """An adapted graph for certain parameters. held: these, so that their ids stay theirs."""

    run: Callable
    tensors: tuple[torch.Tensor, ...]
    held: list
    used: bool = False


class Adapted:
    """What runs in place of one of Dynamo's graphs. runs: an adapted graph's text -> what runs it, whichever adapters' it is."""

    def __init__(self, owner: Backend, gm: fx.GraphModule, inputs: Sequence, compiler: Callable):
        self.owner, self.gm, self.compiler = owner, gm, compiler
        names = owner.names()
        self.watched = [i for i, x in enumerate(inputs) if isinstance(x, nn.Parameter) or id(x) in names]
        self.traces: dict = Recent(TRACES)
        self.variants: dict[tuple, Variant] = {}
        self.runs: dict[tuple, Callable] = Recent(RUNS)
        self.add(inputs, compiler)

    def __call__(self, *args: Any) -> Any:
        variant = self.variants.get(self.key(args)) or self.add(args, self.compile_late)
        if variant.used and not self.owner.complete:
            self.owner.check_complete()
        variant.used = True
        with self.owner.adapters.peft_fx.sharing.forward():
            return variant.run(*args, *variant.tensors)

    def key(self, args: Sequence) -> tuple:
        owner = self.owner
        seen = tuple([id(args[i]) for i in self.watched])
        return seen, owner.attached.training, owner.acting_now(), owner.changes

    def add(self, args: Sequence, compiler: Callable) -> Variant:
        """The variant for these parameters: another one's graph if that is the same, else a graph of its own."""
        with TRACING:  # which sets the store's mode
            gm, names = self.adapted(args)
        tensors = tuple(tensor_of(self.owner.adapters, name) for name in names)
        fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")[len(args) :]]
        text = gm.code, *(r.code for r in regions(gm)), *map(signature, fakes)
        run = self.runs.get(text)
        if run is None:
            run = self.runs[text] = compiler(gm, [*args, *fakes])
        new = Variant(run, tensors, [args[i] for i in self.watched])
        # those from before a change are not found again, and would keep the tensors of adapters that were deleted
        now = {key: variant for key, variant in self.variants.copy().items() if key[-1] == self.owner.changes}
        self.variants = {**now, self.key(args): new}
        return new

    def adapted(self, args: Sequence) -> tuple[fx.GraphModule, list[str]]:
        """Dynamo's graph with the adapters of the parameters among `args`, and the names of its further inputs."""
        owner, known = self.owner, self.owner.names()
        table = state_of(owner.adapters).table
        inputs = {i: (args[i], known[id(args[i])]) for i in self.watched if id(args[i]) in known}
        found = {weight_name(name) for _, names in inputs.values() for name in names}
        names, gated = owner.acting_now()
        chosen = tuple(p for p in owner.state.placed(names) if p.target.name in found)
        owner.read |= {p.target.name for p in chosen}
        base = BaseGraph(fx.Graph())
        base.traces = self.traces
        store = owner.adapters.peft_fx
        store.mode.training = owner.attached.training
        new, ours = adapt(self.gm, inputs, chosen, State(table, base, gated=gated), store)
        for name in ("_param_name_to_source", "_source_to_user_stacks"):
            setattr(new, name, getattr(self.gm, name, {}))
        return new, ours

    def compile_late(self, gm: fx.GraphModule, inputs: Sequence) -> Callable:
        """After Dynamo has gone: it traces the adapted graph, for guards on what sizes this one meets."""
        return self.compiler(gm, inputs) if self.compiler is eager else torch.compile(gm, backend=self.compiler)


def eager(gm: fx.GraphModule, inputs: Sequence) -> Callable:
    """Runs a graph as it is. Checkpoints draw the same random numbers again, which Dynamo leaves to compilers behind it."""
    for node in gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        node.target = checkpoint
        node.kwargs = {**node.kwargs, "use_reentrant": False, "preserve_rng_state": True}
    gm.recompile()
    return gm.forward


def without_graph(model: nn.Module, store: Store | None = None, state: State | None = None) -> Shared:
    """A graph module over the model's tree and own tensors that runs nothing."""
    with opened(model):
        tree = skeleton(model)
    device = next(model.parameters(), torch.empty(0)).device
    buffers = {n: (b, n not in tree._non_persistent_buffers_set) for n, b in tree._buffers.items()}
    state = state or State(module_table(model), None)
    if state.base is None:
        nothing = fx.Graph()
        nothing.output(None)
        state = state.update(base=BaseGraph(nothing))
    store = store or Store(ByMode(model.training), ByDevice(device))
    gm = build(
        {ROOT: store, **cast(dict[str, nn.Module], tree._modules)}, dict(tree._parameters), buffers, fx.Graph(), state
    )
    gm.meta[MODEL] = model
    gm.peft_fx.sharing.add(gm)
    return gm


def sources(recipe: Any, adapter_name: str) -> Iterator[tuple]:
    """(adapter name, config, None) for the adapters of a recipe, (adapter name, None, path) for files."""
    if isinstance(recipe, (str, Path)) and Path(recipe).suffix not in RECIPE_FILES:
        yield adapter_name, None, recipe
    else:
        chosen: Recipe = as_recipe(recipe, adapter_name)
        yield from ((name, config, None) for name, config in chosen.items())
