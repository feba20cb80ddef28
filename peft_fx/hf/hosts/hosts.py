"""Modules that compute with targets. From wherever one is called, its forward runs a graph of its own, with the adapters in it.

    Linear.forward                x, W, b -> linear(x, W, b)                 traced once for all modules that are alike
    with an adapter that acts     x, W, b, A, B -> linear(x, W, b) + ...     `adapt`, as for Dynamo's graphs
    at a call                     graph(x, *the tensors that the module and the store hold now)

The model's other code runs as it is written: any call signature, caches, hooks, autocast, checkpoints; a torch.compile of
the user's traces through. A module with parts, or one that no single graph describes (a loop over experts), goes through
Dynamo on its own: `verbs/backend.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from ...engine.derive import placements
from ...engine.python_parts import give_frames, of_torch
from ...notices import warn
from ...planning.plan import Placement
from ...verbs.backend import Backend
from .traced import Ready, Traced, Untraceable, attributes, usual_inputs

# Dynamo gives up after a few graphs for one function and runs it as it is written, without adapters and without an error.
GRAPHS = 1 << 16
LIMITS = {"fail_on_recompile_limit_hit": True, "accumulated_recompile_limit": GRAPHS}
TRACING = threading.RLock()  # a trace sets the store's mode
BASE = "__base__"  # what callers name for rows without an adapter
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # torch's modules that call or hold their parts as modules


class Host:
    """A module's forward. ready: what runs, by kind of call, with the adapters that act; tables: that, for other adapters too."""

    def __init__(self, hosts: Hosts, module: nn.Module, path: str):
        self.hosts, self.module, self.path = hosts, module, path
        # accelerate's hooks move weights in and out around the forward that they found
        self.name = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
        self.replaced = module.__dict__.get(self.name)
        as_written = getattr(self.forward, "__func__", None) is type(module).forward
        self.dynamo = bool(module._modules) or not as_written
        self.used = False
        self.compiled: Callable | None = None
        self.forget()
        self.open()

    @property
    def active_adapters(self) -> tuple[str, ...]:
        return self.hosts.active

    @property
    def forward(self) -> Callable:
        """The module's own."""
        return self.replaced or type(self.module).forward.__get__(self.module)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("tables", "ready", "compiled")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, compiled=None)
        self.tables, self.ready = {}, {}

    def open(self) -> None:
        """Calls of the module come here."""
        setattr(self.module, self.name, self)

    def close(self) -> None:
        """The module's forward is its own again."""
        if self.replaced is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.replaced)

    def forget(self) -> None:
        """After adapters came or went, or tensors were replaced."""
        self.ready: dict[tuple, Ready] = {}
        self.tables: dict[tuple[str, ...], dict[tuple, Ready]] = {self.hosts.active: self.ready}

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
        return ready.run(*args, *[held.tensor for held in ready.tensors])

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
            self.refuse_no_rows(parts[-1], len(index))
            indices.append(index)
        order = torch.cat(indices).argsort()
        return tree_map(lambda *x: torch.cat(x).index_select(0, order), *parts)

    def refuse_no_rows(self, outputs, count: int) -> None:
        """Raises TypeError for outputs that have no row for each of the inputs': recurrent modules' states lead with layers."""
        wrong = [x for x in tree_flatten(outputs)[0] if torch.is_tensor(x) and (not x.dim() or len(x) != count)]
        if wrong or isinstance(self.module, nn.RNNBase):
            shapes = [tuple(x.shape) for x in wrong]
            raise TypeError(
                f"{self.path}: adapter_names needs outputs whose first dimension is the batch, {count} rows here, and its "
                f"{type(self.module).__name__} gives others {shapes or ''}: leave it out of the adapters"
            )


@torch.compiler.disable(recursive=False)
def through_dynamo(host: Host, active: tuple[str, ...], args: tuple, kwargs: dict):
    """The host's forward as Dynamo's graphs, with adapters. A torch.compile around it breaks its graph here."""
    backend, host.used = host.hosts.backend, True
    if not host.hosts.placements(host, active):
        return host.forward(*args, **kwargs)
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
    chosen = host.hosts.placements(host, active)
    if not chosen:
        table[key] = Ready(host.forward, ())
        return True
    try:
        # what tracing saves for a backward is nothing to a checkpoint that this call is in
        with TRACING, saved_tensors_hooks(lambda t: t, lambda t: t):
            graph = host.hosts.traced(host.module, key)
            table[key] = graph.ready(host.hosts.backend, host.module, host.path, chosen, args)
        host.used |= table[key].complete
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
        """Warns of modules whose adapters did not act in the first call of the model."""
        acting = [h for h in self.opened.values() if self.placements(h, self.active)]
        if unused := [h.path for h in acting if not self.has_acted(h)]:
            warn(
                f"{len(unused)} of {len(acting)} adapted modules, first {unused[0]}, did not use their weights in the model's "
                "first call: it does not call them with such inputs, or reads the weights elsewhere, where no adapter acts"
            )

    def has_acted(self, host: Host) -> bool:
        """Whether some graph that ran for it has an adapter in it."""
        targets = {p.target.name for p in self.placements(host, self.active)}
        return host.used and not (host.dynamo and targets.isdisjoint(self.backend.read))

    def refresh(self, active: tuple[str, ...]) -> None:
        """After adapters came or went, or tensors of theirs or of the model were replaced. active: those that act now."""
        self.active = active
        self.lock()
        placed = {name: placements(self.backend.state, name) for name in self.backend.state.recipe}
        paths = {p.target.path for found in placed.values() for p in found}
        wholes = {path for path in paths if self.model.get_submodule(path)._modules}
        self.chosen: dict[tuple[nn.Module, str], list[Placement]] = {}
        for name, found in placed.items():
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

    def traced(self, module: nn.Module, key: tuple) -> Traced:
        """The graphs of the module's forward for a kind of call: those of all modules that are alike."""
        return self.graphs.setdefault((type(module), key, *attributes(module)), Traced(module))

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
