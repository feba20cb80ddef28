"""Modules that compute with targets. From wherever one is called, its forward runs a graph of its own, with the adapters in it.

    Linear.forward                x, W, b -> linear(x, W, b)                 traced once for all modules that are alike
    with an adapter that acts     x, W, b, A, B -> linear(x, W, b) + ...     `adapt`, as for Dynamo's graphs
    at a call                     graph(x, *the tensors that the module and the store hold now)

The model's other code runs as it is written: any call signature, caches, hooks, autocast, checkpoints; a torch.compile of
the user's traces through. A module with parts, or one that no single graph describes (a loop over experts), goes through
Dynamo on its own: `verbs/backend.py`.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental import _config as symbolic
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from ..methods import get_method
from ..passes.dynamo import adapt
from ..passes.fakes import fake_of
from ..passes.inject import bare
from ..planning.kinds import Refusal, module_targets
from ..planning.plan import Placement
from ..store import ADAPTERS, BaseGraph, State, owner_of
from ..target import ModuleRecord
from ..verbs.backend import Backend
from ..verbs.derive import placements
from ..verbs.python_parts import give_frames, of_torch

# Dynamo gives up after a few graphs for one function and runs it as it is written, without adapters and without an error.
GRAPHS = 1 << 16
LIMITS = {"fail_on_recompile_limit_hit": True, "accumulated_recompile_limit": GRAPHS}
LITERALS = (bool, int, float, str, tuple, type(None), torch.dtype, torch.device)
BASE = "__base__"  # what callers name for rows without an adapter
# operator kind -> sizes before and behind the features, of inputs that are usual
INPUTS = {
    "linear": ([(256,), (2, 128)], ()),
    "embedding": ([(2, 128)], ()),
    "norm": ([(2, 128)], ()),
    "conv1d": ([(2,)], (256,)),
    "conv2d": ([(2,)], (64, 64)),
    "conv3d": ([(2,)], (16, 64, 64)),
}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # torch's modules that call or hold their parts as modules


class Held(NamedTuple):
    """Where a tensor lies at any time: a module's `_parameters` or `_buffers`, and its name there."""

    place: dict
    name: str


class Ready(NamedTuple):
    """What a host runs for one kind of call: a function of the call's arguments and of these tensors."""

    run: Callable
    tensors: tuple[Held, ...]


class Untraceable(Exception):
    """No single graph describes the module's forward."""


class Traced:
    """The graph of modules that are alike, for one kind of call.

    adapted: adapters that are alike -> what runs, and whose tensors it takes.
    """

    def __init__(self, module: nn.Module, args: Sequence[torch.Tensor]):
        self.graph, self.names = traced(module, args)
        self.count = len(args)
        self.traces: dict = {}
        self.adapted: dict[tuple, tuple[Callable, list[tuple[int, str]]]] = {}

    def ready(self, host: Host, chosen: tuple[Placement, ...]) -> Ready:
        """The graph with these adapters in it, over the host's tensors and theirs."""
        backend, own = host.hosts.backend, [held(host.module, name) for name in self.names]
        key = tuple(map(likeness, chosen))
        if key not in self.adapted:
            store, base = backend.adapters.peft_fx, BaseGraph(fx.Graph())
            store.mode.training, base.traces = host.module.training, self.traces
            inputs = {
                self.count + i: (place[name], (f"{host.path}.{name}" if host.path else name,))
                for i, (place, name) in enumerate(own)
            }
            gm, further = adapt(self.graph, inputs, chosen, State(backend.state.table, base), store)
            where = {f"{ADAPTERS}.{p.resolve(n).name}": (i, n) for i, p in enumerate(chosen) for n in p.tensors}
            self.adapted[key] = gm.forward, [where[name] for name in further]
        run, further = self.adapted[key]
        ours = [held(backend.adapters, f"{ADAPTERS}.{chosen[i].resolve(name).name}") for i, name in further]
        return Ready(run, (*own, *ours))


class Host:
    """A module's forward. ready: what runs, by kind of call, with the adapters that act."""

    def __init__(self, hosts: Hosts, module: nn.Module, path: str):
        self.hosts, self.module, self.path = hosts, module, path
        # accelerate's hooks move weights in and out around the forward that they found
        self.name = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
        self.forward = getattr(module, self.name)
        self.dynamo = bool(module._modules)
        self.used = False
        self.compiled: Callable | None = None
        self.forget()
        setattr(module, self.name, self)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("tables", "ready", "compiled")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, compiled=None)
        self.tables, self.ready = {}, {}

    def close(self) -> None:
        """The module's forward is its own again."""
        if self.name == "forward":
            del self.module.forward
        else:
            setattr(self.module, self.name, self.forward)

    def forget(self) -> None:
        """After adapters came or went, or tensors were replaced."""
        self.tables: dict[tuple[str, ...], dict[tuple, Ready]] = {}
        self.choose()

    def choose(self) -> None:
        """After other adapters are to act."""
        self.ready = self.tables.setdefault(self.hosts.active, {})

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            self.foresee()
        if self.hosts.mixed and (rows := self.hosts.rows()):
            return self.by_rows(rows, args, kwargs)
        return self.run(self.ready, self.hosts.active, args, kwargs)

    def run(self, table: dict, active: tuple[str, ...], args: tuple, kwargs: dict):
        """The forward with the adapters `active`, whose table is `table`."""
        if self.dynamo or kwargs or not all(map(torch.is_tensor, args)):
            return through_dynamo(self, active, args, kwargs)
        key = (self.module.training, *map(kind, args))
        ready = table.get(key)
        if ready is None:
            if not prepare(self, table, key, active, args):
                self.dynamo = True
                return through_dynamo(self, active, args, kwargs)
            ready = table[key]
        return ready.run(*args, *[place[name] for place, name in ready.tensors])

    @torch._dynamo.assume_constant_result
    def foresee(self) -> None:
        """Prepares the usual kinds of call, before a compiler that cannot stop for it gets here."""
        for x in () if self.dynamo else usual_inputs(self.module, self.hosts.backend.state.table[self.path]):
            key = (self.module.training, kind(x))
            if key not in self.ready:
                prepare(self, self.ready, key, self.hosts.active, (x,))

    def by_rows(self, rows: Rows, args: tuple, kwargs: dict):
        """Each row of the batch with its own adapter: the rows of one adapter together, then in their order again.

        A batch may have several rows for each name, one after the other: beams, or the tokens of a flattened batch.
        """
        tensors = [x for x in tree_flatten((args, kwargs))[0] if torch.is_tensor(x)]
        lengths = {len(x) if x.dim() else 0 for x in tensors}
        if getattr(self.module, "batch_first", True) is False:
            raise TypeError(f"{self.path}: adapter_names needs inputs whose first dimension is the batch, and its "
                            f"{type(self.module).__name__} has batch_first=False")  # fmt: skip
        if len(lengths) != 1 or (length := lengths.pop()) % len(rows.names):
            raise ValueError(f"{self.path}: adapter_names gives {len(rows.names)} names, and inputs of shapes "
                             f"{[tuple(x.shape) for x in tensors]} have no rows for each")  # fmt: skip
        parts, indices = [], []
        for name, index in rows.by_adapter(length, tensors[0].device).items():
            active = () if name == BASE else (name,)
            some, named = tree_map_only(torch.Tensor, lambda x: x.index_select(0, index), (args, kwargs))  # noqa: B023
            parts.append(self.run(self.tables.setdefault(active, {}), active, some, named))
            indices.append(index)
        order = torch.cat(indices).argsort()
        return tree_map(lambda *x: torch.cat(x).index_select(0, order), *parts)


@torch.compiler.disable(recursive=False)
def through_dynamo(host: Host, active: tuple[str, ...], args: tuple, kwargs: dict):
    """The host's forward as Dynamo's graphs, with adapters. A torch.compile around it breaks its graph here."""
    backend, host.used = host.hosts.backend, True
    if host.compiled is None:
        host.compiled = torch.compile(host.forward, backend=backend, recompile_limit=GRAPHS, isolate_recompiles=True)
    others = backend.active
    if active != others:
        backend.set_adapter(active)
    try:
        with torch._dynamo.config.patch(LIMITS):
            return host.compiled(*args, **kwargs)
    finally:
        if active != others:
            backend.set_adapter(others)


@torch.compiler.disable
def prepare(host: Host, table: dict, key: tuple, active: tuple[str, ...], args: tuple) -> bool:
    """Fills `table` for such arguments. False if no single graph does."""
    host.used = True
    chosen = host.hosts.placements(host, active)
    if not chosen:
        table[key] = Ready(host.forward, ())
        return True
    try:
        # what tracing saves for a backward is nothing to a checkpoint that this call is in
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            table[key] = host.hosts.traced(host.module, key, args).ready(host, chosen)
    except Untraceable:
        return False
    return True


class Rows:
    """Which adapter each row of a batch has."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.found: dict[tuple, dict[str, torch.Tensor]] = {}

    def by_adapter(self, length: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Adapter -> indices of its rows, in a batch of `length` rows."""
        if (length, device) not in self.found:
            each = [name for name in self.names for _ in range(length // len(self.names))]
            self.found[length, device] = {
                name: torch.tensor([i for i, n in enumerate(each) if n == name], device=device)
                for name in dict.fromkeys(each)
            }
        return self.found[length, device]


class Hosts:
    """Those of one model and its adapters. active: the adapters that act; mixed: thread -> `Rows` of the call it is in."""

    def __init__(self, model: nn.Module, backend: Backend):
        self.model, self.backend = model, backend
        self.active: tuple[str, ...] = ()
        self.opened: dict[nn.Module, Host] = {}
        self.graphs: dict[tuple, Traced] = {}
        self.mixed: dict[int, Rows] = {}
        self.calls = 0
        backend.complete = True  # its graphs are of single modules: none reads every target

    def __getstate__(self) -> dict:
        return {**self.__dict__, "graphs": {}, "mixed": {}}

    def lock(self) -> None:
        """Makes calls of the model forwards to the lock. A copied module has forgotten it."""
        self.model._compiled_call_impl = self.locked

    def locked(self, *args, **kwargs):
        """A call of the model: no swap comes between its modules."""
        if torch.compiler.is_compiling():
            return self.model._call_impl(*args, **kwargs)
        self.calls += 1
        if self.calls == 2:
            self.check_used()
        with self.backend.adapters.peft_fx.sharing.forward():
            return self.model._call_impl(*args, **kwargs)

    def check_used(self) -> None:
        """Warns of modules with adapters that the first call of the model did not call."""
        acting = [h for h in self.opened.values() if self.placements(h, self.active)]
        if unused := [h.path for h in acting if not h.used]:
            warnings.warn(
                f"{len(unused)} of {len(acting)} adapted modules, first {unused[0]}, were not called in the model's first call: "
                "it has no use for them with such inputs, or reads their weights elsewhere, where no adapter acts",
                stacklevel=4,
            )

    def refresh(self, active: tuple[str, ...]) -> None:
        """After adapters came or went, or tensors of theirs or of the model were replaced. active: those that act now."""
        self.active = active
        self.lock()
        self.placed = {name: placements(self.backend.state, name) for name in self.backend.state.recipe}
        paths = {p.target.path for found in self.placed.values() for p in found}
        wholes = {path for path in paths if self.model.get_submodule(path)._modules}
        self.chosen: dict[tuple[nn.Module, str], list[Placement]] = {}
        for name, found in self.placed.items():
            for p in found:
                host = self.host(p.target.path, wholes)
                self.chosen.setdefault((host.module, name), []).append(p)
                if host.dynamo:
                    give_frames(filter(of_torch, [self.model.get_submodule(p.target.path)]))
        for host in self.opened.values():
            host.forget()

    def host(self, path: str, wholes: set[str]) -> Host:
        """The host of the targets that the module at `path` owns: it, or one that has it as a part and reads its weights."""
        parts = path.split(".") if path else []
        for end in range(len(parts) + 1):
            above = ".".join(parts[:end])
            module = self.model.get_submodule(above)
            if above == path or above in wholes or (of_torch(module) and not isinstance(module, CONTAINERS)):
                break
        if module not in self.opened:
            self.opened[module] = Host(self, module, above)
        return self.opened[module]

    def placements(self, host: Host, active: Iterable[str]) -> tuple[Placement, ...]:
        """What these adapters put into a host, in order."""
        return tuple(p for name in active for p in self.chosen.get((host.module, name), ()))

    def traced(self, module: nn.Module, key: tuple, args: tuple) -> Traced:
        """The graph of the module's forward for such arguments: one for all modules that are alike."""
        alike = (type(module), key, *attributes(module))
        if alike not in self.graphs:
            self.graphs[alike] = Traced(module, args)
        return self.graphs[alike]

    def rows(self) -> Rows | None:
        """Of the call that this thread is in."""
        return self.mixed.get(threading.get_ident())

    @contextmanager
    def by_rows(self, names: Sequence[str]) -> Iterator[None]:
        """Calls of this thread inside the block: each row of the batch with the adapter of this name."""
        thread = threading.get_ident()
        self.mixed[thread] = Rows(names)
        try:
            yield
        finally:
            del self.mixed[thread]

    def close(self) -> None:
        """The model is called as before it had adapters."""
        self.model._compiled_call_impl = None
        for host in self.opened.values():
            host.close()
        self.opened.clear()


def kind(x: torch.Tensor) -> tuple:
    """What of an argument a graph depends on, besides its sizes."""
    device = x.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return x.dtype, x.dim(), device, autocast


def usual_inputs(module: nn.Module, record: ModuleRecord) -> Iterator[torch.Tensor]:
    """What such a module is usually called with; nothing for one that is not known."""
    if isinstance(targets := module_targets(record), Refusal):
        return
    for target in targets:
        W = module._parameters[target.parameter]
        outer, inner = INPUTS[target.kind]
        for sizes in outer:
            if target.kind == "embedding":
                yield W.new_empty(sizes, dtype=torch.long)
            else:
                features = target.shape[0] if target.kind == "norm" else target.shape[1] * target.groups
                yield W.new_empty(*sizes, features, *inner)


def likeness(p: Placement) -> tuple:
    """Equal for placements whose graphs differ in nothing but the names of their tensors."""
    shapes = tuple((name, t.shape, t.dtype) for name, t in p.tensors.items())
    shared = tuple((name, p.resolve(name)) for name in p.shared)
    return p.adapter, type(get_method(p.method)), repr(p.config), bare(p), p.target.has_bias, shapes, shared, p.lowering


def attributes(module: nn.Module) -> Iterator[tuple]:
    """All that the forward of a module without parts can read of it: of tensors what a graph sees, else value or identity."""
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers"):
            yield from (
                (n, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for n, t in value.items() if t is not None
            )
        elif not name.startswith("_") and name != "forward":
            yield name, value if isinstance(value, LITERALS) else id(value)


def held(root: nn.Module, name: str) -> Held:
    owner, leaf = owner_of(root, name)
    return Held(owner._parameters if leaf in owner._parameters else owner._buffers, leaf)


def traced(module: nn.Module, args: Sequence[torch.Tensor]) -> tuple[fx.GraphModule, list[str]]:
    """(a graph as Dynamo gives it, with one call in it: of the module's forward, on the arguments and on the module's tensors,
    the names of these). Raises Untraceable if the forward depends on values or sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    own = {n: t for n, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}

    def forward(*values):
        twin = copy.copy(module)
        twin.__dict__.pop("forward", None)
        given = dict(zip(own, values[len(args) :], strict=True))
        for kind in ("_parameters", "_buffers"):
            twin.__dict__[kind] = {n: given.get(n) for n in module.__dict__[kind]}
        return twin.forward(*values[: len(args)])

    graph = fx.Graph()
    with symbolic.patch(backed_size_oblivious=True):
        fakes = [symbolic_fake(mode, x.detach(), f"x{i}") for i, x in enumerate(args)]
        fakes += [fake_of(mode, t) for t in own.values()]
        try:
            with mode:
                result = forward(*fakes)
        except Exception as error:
            raise Untraceable from error
    if mode.shape_env.guards and not of_torch(module):
        raise Untraceable
    nodes = [graph.placeholder(f"x{i}") for i in range(len(fakes))]
    for node, fake in zip(nodes, fakes, strict=True):
        node.meta["example_value"] = fake
    call = graph.call_function(forward, tuple(nodes))
    call.meta["example_value"] = result
    graph.output(call)
    return fx.GraphModule(nn.Module(), graph), list(own)


def symbolic_fake(mode: FakeTensorMode, x: torch.Tensor, name: str) -> torch.Tensor:
    """A fake of any size but in the last dimension, in which modules fit their inputs."""
    sizes = [DimDynamic.DYNAMIC] * (x.dim() - 1) + [DimDynamic.STATIC] * (x.dim() > 0 and x.is_floating_point())
    sizes += [DimDynamic.DYNAMIC] * (x.dim() - len(sizes))
    return mode.from_tensor(
        x, source=ConstantSource(name), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
    )
