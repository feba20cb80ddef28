"""Modules that compute with targets. From wherever one is called, its forward runs a graph of its own, with the adapters in it.

    Linear.forward                x, W, b -> linear(x, W, b)                 traced once for all modules that are alike
    with an adapter that acts     x, W, b, A, B -> linear(x, W, b) + ...     `adapt`, as for Dynamo's graphs
    at a call                     graph(x, *the tensors that the module and the store hold now)

Which adapters act a call learns from the snapshot that it took (`acting.py`). The model's other code runs as it is written:
any call signature, caches, hooks, autocast, checkpoints; a torch.compile of the user's traces through. A module with parts, or
one that no single graph describes (a loop over experts), goes through Dynamo on its own: `verbs/backend.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from ...engine.python_parts import give_frames, of_torch
from ...notices import warn
from ...passes.core.splice import TRACING
from ...planning.modules import own_class
from ...storage.twins import stay_canonical, twin
from ...store.sharing import Forward
from ...store.state import State
from ...verbs.backend import Backend
from .acting import Acting, Rows, Snapshots
from .bindings import Bindings
from .locked import Locked, lock
from .modes import no_modes
from .offloaded import HOOK, brought, owners
from .raw import PLAIN, raw, raw_forward
from .traced import Ready, Traced, Untraceable, attributes, usual_inputs

# Dynamo gives up after a few graphs for one function and runs it as it is written, without adapters and without an error.
GRAPHS = 1 << 16
LIMITS = {
    "fail_on_recompile_limit_hit": True,
    "accumulated_recompile_limit": GRAPHS,
    "allow_unspec_int_on_nn_module": True,  # modules that count their calls
}
BASE = "__base__"  # what callers name for rows without an adapter
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # torch's modules that call or hold their parts as modules
NONE = Acting((), {}, ())
LOG = logging.getLogger(__name__)


class Host:
    """A module's forward. index: its place in the tables of snapshots."""

    def __init__(self, hosts: Hosts, module: nn.Module, path: str, index: int):
        self.hosts, self.module, self.path, self.index = hosts, module, path, index
        # accelerate's hooks move weights in and out around the forward that they found
        self.name = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
        self.replaced = module.__dict__.get(self.name)
        self.tracee = module  # or, for a package's layer, what stands in for it
        as_written = getattr(self.forward, "__func__", None) is type(module).forward
        self.dynamo = bool(module._modules) or not as_written
        self.used = False
        self.compiled: Callable | None = None
        self.open()

    @property
    def active_adapters(self) -> tuple[str, ...]:
        return self.hosts.seen().names

    @property
    def forward(self) -> Callable:
        """The module's own."""
        return self.replaced or type(self.module).forward.__get__(self.module)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "compiled": None, "tracee": self.module}

    def look(self) -> bool:
        """Finds what is traced; True if that is another now: the module keeps its weights in other tensors."""
        found = twin(self.module) or self.module
        if found is self.tracee:
            return False
        self.tracee, self.compiled = found, None
        return True

    def open(self) -> None:
        """Calls of the module come here."""
        setattr(self.module, self.name, self)

    def close(self) -> None:
        """The module's forward is its own again."""
        if self.replaced is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.replaced)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            self.foresee()
            return self.run(cast(Acting, self.hosts.now), args, kwargs)
        call = self.hosts.sharing.call()
        if call is None:
            return self.hosts.called(self, args, kwargs)
        if call.rows is not None:
            return self.by_rows(call, args, kwargs)
        if call.seen is None:
            call.seen = self.hosts.seen()
        return self.run(call.seen, args, kwargs)

    def run(self, acting: Acting, args: tuple, kwargs: dict) -> Any:
        """The forward with the adapters of a snapshot."""
        if self.dynamo or kwargs or not all(map(torch.is_tensor, args)):
            return through_dynamo(self, acting, args, kwargs)
        key = (self.module.training, *map(kind, args))
        ready = acting.table(self.index).get(key)
        if ready is None or not ready.holds():
            if not prepare(self, acting, key, args):
                self.dynamo = True
                return through_dynamo(self, acting, args, kwargs)
            ready = acting.table(self.index)[key]
        if any([HOOK in held.shadow and held.owner is not self.module for held in ready.tensors]):
            return run_offloaded(self, ready, args)
        return ready.run(*args, *[held.tensor for held in ready.tensors])

    @torch._dynamo.assume_constant_result
    def foresee(self) -> None:
        """Prepares the usual kinds of call, before a compiler that cannot stop for it gets here."""
        acting = self.hosts.seen()
        for x in () if self.dynamo else usual_inputs(self.tracee, self.hosts.backend.state.table[self.path]):
            key = (self.module.training, kind(x))
            if key not in acting.table(self.index):
                prepare(self, acting, key, (x,))

    def by_rows(self, call: Forward, args: tuple, kwargs: dict) -> Any:
        """Each row of the batch with its own adapter: the rows of one adapter together, then in their order again.

        A batch may have several rows for each name, one after the other: beams, or the tokens of a flattened batch.
        """
        rows: Rows = call.rows
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
            some, named = tree_map_only(torch.Tensor, lambda x: x.index_select(0, index), (args, kwargs))  # noqa: B023
            parts.append(self.run(rows.acting[name], some, named))
            self.refuse_no_rows(parts[-1], len(index))
            indices.append(index)
        order = torch.cat(indices).argsort()
        return tree_map(lambda *x: torch.cat(x).index_select(0, order) if torch.is_tensor(x[0]) else x[0], *parts)

    def refuse_no_rows(self, outputs: Any, count: int) -> None:
        """Raises TypeError for outputs that have no row for each of the inputs': recurrent modules' states lead with layers."""
        wrong = [x for x in tree_flatten(outputs)[0] if torch.is_tensor(x) and (not x.dim() or len(x) != count)]
        if wrong or isinstance(self.module, nn.RNNBase):
            shapes = [tuple(x.shape) for x in wrong]
            raise TypeError(
                f"{self.path}: adapter_names needs outputs whose first dimension is the batch, {count} rows here, and its "
                f"{type(self.module).__name__} gives others {shapes or ''}: leave it out of the adapters"
            )


@torch.compiler.disable
def run_offloaded(host: Host, ready: Ready, args: tuple) -> Any:
    """What `Ready` says, with the adapters' tensors brought for it; the module's own hook has brought its."""
    with brought(held.owner for held in ready.tensors if held.owner is not host.module):
        return ready.run(*args, *[held.tensor for held in ready.tensors])


@torch.compiler.disable(recursive=False)
def through_dynamo(host: Host, acting: Acting, args: tuple, kwargs: dict) -> Any:
    """The host's forward as Dynamo's graphs, with adapters. A torch.compile around it breaks its graph here."""
    hosts, host.used = host.hosts, True
    chosen = acting.placed.get(host.index, ())
    if not chosen:
        with raw():
            return host.forward(*args, **kwargs)
    ours = owners(hosts.backend.adapters, chosen)
    # any call may compile, which is safe in one thread at a time, and Dynamo's limits are there for all threads
    with hosts.sharing.forward(), TRACING, torch._dynamo.config.patch(LIMITS), raw(), brought(ours):
        if host.compiled is None:
            traced = host.forward if host.tracee is host.module else host.tracee.forward
            host.compiled = torch.compile(  # type: ignore[call-overload]  # torch's overloads lack the limits
                traced, backend=hosts.backend, recompile_limit=GRAPHS, isolate_recompiles=True
            )
        call = cast(Forward, hosts.sharing.call())
        before, call.seen = call.seen, acting  # where the backend looks
        try:
            return host.compiled(*args, **kwargs)
        finally:
            call.seen = before


@torch.compiler.disable
def prepare(host: Host, acting: Acting, key: tuple, args: tuple) -> bool:
    """Puts what runs for such arguments into a snapshot's table. False if no single graph does."""
    table, chosen = acting.table(host.index), acting.placed.get(host.index, ())
    if not chosen:
        table[key] = Ready(host.replaced or raw_forward(host.module), ())
        return True
    try:
        ours = owners(host.hosts.backend.adapters, chosen)
        with TRACING, no_modes(), brought(ours):
            graph = host.hosts.traced(host.tracee, key)
            table[key] = graph.ready(host.hosts.backend, host.tracee, host.path, chosen, acting.gated, args)
        host.used |= table[key].complete
    except Untraceable as reason:
        LOG.info("%s: no single graph describes its forward, it goes through Dynamo: %s", host.path, reason)
        return False
    return True


class Hosts:
    """Those of one model and its adapters. now: the snapshot that calls take which begin, None in a copy not yet called.

    renew: refreshes them, and what else depends on which modules the model has.
    """

    def __init__(self, model: nn.Module, backend: Backend, renew: Callable[[], None]):
        self.model, self.backend, self.renew = model, backend, renew
        self.sharing = backend.adapters.peft_fx.sharing
        self.opened: dict[nn.Module, Host] = {}
        self.made = 0
        self.places: dict[str, int] = {}  # path of a target's module -> index of its host
        self.graphs: dict[tuple, Traced] = {}
        self.snapshots = Snapshots()
        self.now: Acting | None = NONE
        self.calls = 0
        backend.complete = True  # its graphs are of single modules: none reads every target

    def __getstate__(self) -> dict:
        """A copy has a lock of its own, and traces anew."""
        return {**self.__dict__, "graphs": {}, "snapshots": Snapshots(), "now": None}

    def seen(self) -> Acting:
        """The snapshot for a call that begins. A copy has none yet, and its modules have forgotten the lock."""
        if self.now is None:
            self.refresh(self.backend.state)
        return cast(Acting, self.now)

    def lock(self) -> None:
        """Makes calls of the model, and of modules in it around hosts, forwards to the lock."""
        around = {path.rpartition(".")[0] for path in (h.path for h in self.opened.values())}
        for path in list(around):
            while path:
                path = path.rpartition(".")[0]
                around.add(path)
        for path in around | {""}:
            lock(self, self.model.get_submodule(path))

    def called(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """A call whose modules see one snapshot, with no write between them."""
        with self.sharing.forward():
            return function(*args, **kwargs)

    @torch.compiler.disable
    def begins(self, module: nn.Module) -> None:
        """A call of the model begins, or of what is around it; the latter's is the one in which modules can be bound anew."""
        self.calls += module is self.model
        if self.calls == 2 and module is self.model:
            self.check_used()
        if self.sharing.call() is None and not self.bindings.hold():
            self.rebind()

    def check_used(self) -> None:
        """Warns of modules whose adapters did not act in the first call of the model."""
        acting = [h for h in self.opened.values() if self.seen().placed.get(h.index)]
        if unused := [h.path for h in acting if not self.has_acted(h)]:
            warn(
                f"{len(unused)} of {len(acting)} adapted modules, first {unused[0]}, did not use their weights in the model's "
                "first call: it does not call them with such inputs, or reads the weights elsewhere, where no adapter acts"
            )

    def has_acted(self, host: Host) -> bool:
        """Whether some graph that ran for it has an adapter in it."""
        targets = {p.target.name for p in self.seen().placed[host.index]}
        return host.used and not (host.dynamo and targets.isdisjoint(self.backend.read))

    def refresh(self, state: State, changed: Sequence[str] = ()) -> None:
        """After adapters came or went. changed: those of which graphs hold something that is another now."""
        ends = (state.table.input_embedding, state.table.output_head)
        self.bindings = Bindings(self.model, [p.target for p in state.placed(state.recipe)], ends)
        stay_canonical(self.model)
        paths = [path for path, module in self.bindings.modules.items() if module is not None]
        wholes = {path for path in paths if self.model.get_submodule(path)._modules}
        for module in self.opened.keys() - set(self.model.modules()):  # others are in their place
            self.opened.pop(module).close()
        places, moved = {}, False
        for path in paths:
            host = self.host(path, wholes)
            places[path] = host.index
            moved |= host.look()
            if host.dynamo:
                give_frames(filter(of_torch, [self.model.get_submodule(path)]))
        self.lock()
        if moved or places.items() != self.places.items():
            self.places, changed = places, (*state.recipe,)
        self.snapshots.forget(state, changed)
        self.publish(state)

    def rebind(self) -> None:
        """Adapters follow to modules that were put in place of theirs. Raises TargetError where they cannot."""
        with self.sharing.swapping():
            if self.bindings.hold():  # it was a capture that had them away
                return
            state = self.backend.state
            if self.bindings.moved(self.model, [p.target for p in state.placed(state.recipe)], state):
                self.backend.keep(self.backend.adapters)
            self.renew()

    def publish(self, state: State) -> None:
        """Calls that begin from now on see this state."""
        names = tuple(state.recipe) if state.gated else state.acting
        self.now = self.snapshots.find(state, names, self.places, state.gated)

    def host(self, path: str, wholes: set[str]) -> Host:
        """The host of the targets that the module at `path` owns: it, or one that has it as a part and reads its weights."""
        parts = path.split(".") if path else []
        for end in range(len(parts) + 1):
            above = ".".join(parts[:end])
            module = self.model.get_submodule(above)
            if above == path or above in wholes or (of_torch(module) and not isinstance(module, CONTAINERS)):
                break
        if module not in self.opened:
            self.opened[module] = Host(self, module, above, self.made)
            self.made += 1
        return self.opened[module]

    def traced(self, module: nn.Module, key: tuple) -> Traced:
        """The graphs of the module's forward for a kind of call: those of all modules that are alike."""
        alike = (own_class(module), key, *attributes(module))
        return self.graphs.setdefault(alike, Traced(module, alike))

    @contextmanager
    def by_rows(self, names: Sequence[str], state: State) -> Iterator[None]:
        """Calls of this thread inside the block: each row of the batch with the adapter of this name."""
        acting = {n: self.snapshots.find(state, () if n == BASE else (n,), self.places) for n in dict.fromkeys(names)}
        with self.sharing.forward():
            call = cast(Forward, self.sharing.call())
            before, call.rows = call.rows, Rows(names, acting)
            try:
                yield
            finally:
                call.rows = before

    def close(self) -> None:
        """The model is called as before it had adapters."""
        for module in self.model.modules():
            if isinstance(module.__dict__.get("_compiled_call_impl"), Locked):
                module._compiled_call_impl = None
        for host in self.opened.values():
            host.close()
        self.opened.clear()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside the block the model is called as before: a capture sees its own code, and lists of equal layers as such."""
        hosts = dict(self.opened)
        self.close()
        try:
            yield
        finally:
            self.opened |= hosts
            for host in hosts.values():
                host.open()
            self.lock()


def kind(x: torch.Tensor) -> tuple:
    """What of an argument a graph depends on, besides its sizes."""
    device = x.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return x.dtype, x.dim(), device, autocast


def take_over(model: nn.Module) -> None:
    """Warns where a PeftModel is around the model already; its adapters act no longer."""
    for module in model.modules():
        module.__dict__.pop(PLAIN, None)  # what was taken off once may be adapted again
    others = hosts_in(model)
    for hosts in others:
        hosts.close()
    if others:
        warn(
            f"There is a PeftModel around this {type(model).__name__} already, whose adapters act no longer: the new ones take "
            "their place. To have both, add one to that PeftModel (add_adapter); else call its unload() first"
        )


def hosts_in(model: nn.Module) -> dict[Hosts, None]:
    """Those of the PeftModels around it."""
    found = [m.__dict__.get(name) for m in model.modules() for name in ("forward", "_old_forward")]
    return dict.fromkeys(host.hosts for host in found if isinstance(host, Host))
