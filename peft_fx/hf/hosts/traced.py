"""What a host runs: the graph of a module's forward, with adapters in it. One for all modules and adapters that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental import _config as symbolic
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ...engine.python_parts import of_torch
from ...methods import get_method
from ...passes.core.fakes import fake_of
from ...passes.dynamo.adapt import adapt
from ...passes.inject.inject import bare
from ...planning.kinds import Refusal, module_targets
from ...planning.modules import own_class
from ...planning.plan import Placement
from ...storage.packed import Packed
from ...store.lazy import Forgetful
from ...store.recent import Recent
from ...store.state import BaseGraph, State
from ...store.tensors import ADAPTERS, gate_name, kept_of, owner_of
from ...target import ModuleRecord
from ...verbs.backend import Backend

LITERALS = (bool, int, float, str, tuple, type(None), torch.dtype, torch.device)
# operator kind -> sizes before and behind the features, of inputs that are usual
INPUTS: dict[str, tuple[list[tuple[int, ...]], tuple[int, ...]]] = {
    "linear": ([(256,), (2, 128)], ()),
    "embedding": ([(2, 128)], ()),
    "norm": ([(2, 128)], ()),
    "conv1d": ([(2,)], (256,)),
    "conv2d": ([(2,)], (64, 64)),
    "conv3d": ([(2,)], (16, 64, 64)),
}


GATE = ""  # stands for the gate of a placement's adapter among the names of its tensors
ADAPTED = 64  # kinds of adapters, by config and sizes, of which modules that are alike keep the graphs
IN_KEY = ("forward", "training")  # attributes that a host's table knows


class Held(NamedTuple):
    """Where a tensor lies at any time: a module's `_parameters` or `_buffers`, and its name there.

    shadow: the module's `__dict__`, whose attributes hide these: while a forward runs, FSDP 1 keeps the gathered tensors there.
    """

    shadow: dict
    place: dict
    name: str
    owner: nn.Module

    @property
    def tensor(self) -> torch.Tensor:
        return self.shadow[self.name] if self.name in self.shadow else self.place[self.name]


class Ready(NamedTuple):
    """What a host runs for one kind of call: a function of the call's arguments and of these tensors.

    complete: whether it has all adapters in it that it was made with. read: attributes of the module that the trace took for
    constant, and their values; own: where it has them.
    """

    run: Callable
    tensors: tuple[Held, ...]
    complete: bool = True
    own: Mapping[str, Any] = MappingProxyType({})
    read: tuple[tuple[str, object], ...] = ()

    def holds(self) -> bool:
        """Whether these are what they were."""
        return all(self.own.get(name) is value or self.own.get(name) == value for name, value in self.read)


class Same:
    """Equal to what is of the same value's identity, and holds it."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Untraceable(Exception):
    """No single graph describes the module's forward."""


class Traced:
    """The graphs of modules that are alike, for one kind of call.

    adapted: adapters that are alike -> what runs, and whose tensors it takes.
    """

    def __init__(self, module: nn.Module, key: tuple):
        self.key = key  # holds what it names by identity
        self.names = list(own_tensors(module))
        self.read: set[str] = set()
        self.adapted: dict[tuple, tuple[Callable, list[tuple[int, str]]]] = Recent(ADAPTED)

    def ready(
        self, backend: Backend, module: nn.Module, path: str, chosen: tuple[Placement, ...], gated: bool, args: Sequence
    ) -> Ready:
        """The graph with these adapters in it, over the module's tensors and theirs. Raises Untraceable."""
        own = [held(module, name) for name in self.names]
        key = gated, likeness(chosen), *(room(backend, p) for p in chosen)
        found = self.adapted.get(key)
        if found is None:
            graph = partial(self.graph, backend, module, path, chosen, gated, own)
            gm, names = sizeless(graph, module, args)
            where = {stored(p, name): (i, name) for i, p in enumerate(chosen) for name in (*p.tensors, GATE)}
            found = self.adapted[key] = gm.forward, [where[name] for name in names]
        run, further = found
        ours = [held(backend.adapters, stored(chosen[i], name)) for i, name in further]
        values = {n: v for n, v in module.__dict__.items() if not n.startswith("_") and n not in (*self.names, *IN_KEY)}
        read = tuple((name, values[name]) for name in values.keys() & self.read)
        complete = {i for i, name in further if name != GATE} == {*range(len(chosen))}
        return Ready(run, (*own, *ours), complete, module.__dict__, read)

    def graph(
        self, backend: Backend, module: nn.Module, path: str, chosen: tuple[Placement, ...], gated: bool, own: list[Held],
        fakes: list,
    ) -> tuple[fx.GraphModule, list[str]]:  # fmt: skip
        """(graph module of the adapted forward, names of the tensors that it takes behind the module's own)."""
        store = backend.adapters.peft_fx
        store.mode.training = module.training
        names = [f"{path}.{name}" if path else name for name in self.names]
        inputs = {len(fakes) + i: (one.tensor, (names[i],)) for i, one in enumerate(own)}
        state = State(backend.state.table, BaseGraph(fx.Graph()), gated=gated)
        return adapt(traced(module, fakes, self.read), inputs, chosen, state, store)


def sizeless(make: Callable, module: nn.Module, args: Sequence[torch.Tensor]) -> tuple[fx.GraphModule, list[str]]:
    """What `make` makes of fakes of the arguments, for arguments of any sizes.

    Symbolic sizes take sympy, whose import alone is most of a first call. Forwards of torch's do not look at sizes: if two
    examples give the same code, it holds none of theirs.
    """
    if of_torch(module):
        with suppress(Untraceable):  # a size that has to be what it was
            one, other = (make(larger_fakes(args, by)) for by in (0, 1))
            if one[0].code == other[0].code:
                return one
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with symbolic.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # put in at run time
        return make([symbolic_fake(mode, x.detach(), f"x{i}") for i, x in enumerate(args)])


def stored(p: Placement, name: str) -> str:
    """Where a tensor of a placement is, or its adapter's gate."""
    return gate_name(p.adapter) if name == GATE else f"{ADAPTERS}.{p.resolve(name).name}"


def likeness(chosen: tuple[Placement, ...]) -> tuple:
    """Equal for placements whose graphs differ in nothing but the names of their adapters and targets."""
    names = list(dict.fromkeys(p.adapter for p in chosen))
    places = {p.resolve(n).name: (i, n) for i, p in reversed(list(enumerate(chosen))) for n in p.tensors}
    found = []
    for p in chosen:
        shapes = tuple((name, t.shape, t.dtype) for name, t in p.tensors.items())
        shared = tuple((name, places[p.resolve(name).name], p.resolve(name).transposed) for name in p.shared)
        config = repr(p.config)
        method = type(get_method(p.method))
        found.append((names.index(p.adapter), method, config, bare(p), p.target.has_bias, shapes, shared, p.lowering))
    return tuple(found)


def room(backend: Backend, p: Placement) -> tuple:
    """The sizes of a placement's tensors, which may be wider than its config says: a graph may hold them as numbers."""
    return tuple(held(backend.adapters, f"{ADAPTERS}.{p.resolve(n).name}").tensor.shape for n in p.tensors)


def attributes(module: nn.Module) -> Iterator[tuple]:
    """All that the forward of a module without parts can read of it: of tensors what a graph sees, else value or identity."""
    own = own_tensors(module)
    yield from ((n, t.shape, t.stride(), t.dtype, t.device) for n, t in own.items())
    yield from ((n, part.text, part.evaluation) for n, part in packed_parts(module).items())
    for name, value in module.__dict__.items():
        if not name.startswith("_") and name != "forward" and name not in own:
            yield name, value if isinstance(value, LITERALS) else Same(value)


def packed_parts(module: nn.Module) -> dict[str, Packed]:
    """What keeps a module's packed parameters."""
    return {name: part for name, part in module._modules.items() if isinstance(part, Packed)}


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers, as its forward sees them; packed ones are `<parameter>_packed.<tensor>`."""
    names = [n for n, t in [*module._parameters.items(), *module._buffers.items()] if t is not None]
    names += [f"{name}.{tensor}" for name, part in packed_parts(module).items() for tensor in part.tensors]
    return {name: held(module, name).tensor for name in names}


def held(root: nn.Module, name: str) -> Held:
    owner, leaf = owner_of(root, name)
    return Held(owner.__dict__, owner._parameters if leaf in owner._parameters else owner._buffers, leaf, owner)


def traced(module: nn.Module, fakes: list, read: set[str]) -> fx.GraphModule:
    """A graph as Dynamo gives it, with one call in it: of the module's forward, on fakes of its arguments and of its tensors.

    read: gets the names of the attributes that the forward reads. Raises Untraceable if it depends on values or sizes, or
    sets attributes.
    """
    mode, count = fakes[0].fake_mode, len(fakes)
    # frozen or not is the user's business here, as in PEFT
    own = {name: fake_of(mode, tensor.detach()) for name, tensor in own_tensors(module).items()}

    def forward(*values: torch.Tensor) -> Any:
        twin: nn.Module = object.__new__(noting(own_class(module), read))
        vars(twin).update(module.__dict__)
        for name in ("forward", *own):
            vars(twin).pop(name, None)
        given = dict(zip(own, values[count:], strict=True))
        for kind in ("_parameters", "_buffers"):
            vars(twin)[kind] = {n: given.get(n) for n in module.__dict__[kind]}
        vars(twin)["_modules"] = {
            n: part.again({t: given[f"{n}.{t}"] for t in part.tensors}) for n, part in packed_parts(module).items()
        }
        before = dict(vars(twin))
        result = twin.forward(*values[:count])
        if changed := [name for name, value in vars(twin).items() if before.get(name, twin) is not value]:
            raise Untraceable(f"it sets {', '.join(changed)}")
        return result

    fakes = [*fakes, *own.values()]
    try:
        with mode:
            result = forward(*fakes)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(f"{type(error).__name__}: {error}") from error
    if mode.shape_env is not None and mode.shape_env.guards and not of_torch(module):
        raise Untraceable("it depends on sizes")
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(fakes))]
    for node, fake in zip(nodes, fakes, strict=True):
        node.meta["example_value"] = fake
    call = graph.call_function(forward, tuple(nodes))
    call.meta["example_value"] = result
    graph.output(call)
    return Forgetful(nn.Module(), graph)


def noting(kind: type[nn.Module], read: set[str]) -> type[nn.Module]:
    """The class, noting which attributes are read."""

    def getattribute(self: nn.Module, name: str) -> Any:
        read.add(name)
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": getattribute, "__module__": kind.__module__})


def larger_fakes(args: Sequence[torch.Tensor], by: int) -> list[torch.Tensor]:
    """Fakes of fixed sizes, larger in every dimension but that of features, the last."""
    mode = FakeTensorMode()
    shapes = [[s if isinstance(s, int) else s.node.hint for s in x.shape] for x in args]
    sizes = [
        [s + by for s in shape[:-1]] + [s + by * (not x.is_floating_point()) for s in shape[-1:]]
        for x, shape in zip(args, shapes, strict=True)
    ]
    with mode:
        return [torch.empty(s, dtype=x.dtype, device=x.device) for s, x in zip(sizes, args, strict=True)]


def symbolic_fake(mode: FakeTensorMode, x: torch.Tensor, name: str) -> torch.Tensor:
    """A fake of any size but in the last dimension, in which modules fit their inputs."""
    sizes = [DimDynamic.DYNAMIC] * (x.dim() - 1) + [DimDynamic.STATIC] * (x.dim() > 0 and x.is_floating_point())
    sizes += [DimDynamic.DYNAMIC] * (x.dim() - len(sizes))
    return mode.from_tensor(
        x, source=ConstantSource(name), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
    )


def usual_inputs(module: nn.Module, record: ModuleRecord) -> Iterator[torch.Tensor]:
    """What such a module is usually called with; nothing for one that is not known."""
    if isinstance(targets := module_targets(record), Refusal):
        return
    for target in targets:
        W = kept_of(module, target.parameter)
        outer, inner = INPUTS[target.kind]
        for sizes in outer:
            if target.kind == "embedding":
                yield torch.empty(sizes, dtype=torch.long, device=W.device)
            else:
                features = target.shape[0] if target.kind == "norm" else target.shape[1] * target.groups
                yield torch.empty(*sizes, features, *inner, dtype=W.dtype, device=W.device)
