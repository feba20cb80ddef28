"""Whether a model still has the modules that its adapters were put on: what is put in their place has none."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ...errors import TargetError
from ...planning.modules import own_class
from ...storage.recognise import recognise
from ...storage.twins import twin
from ...store.state import State
from ...target import Target, sizes
from .raw import PLAIN

SIZES = ("num_embeddings", "out_features")  # which tools change in place
REMEDY = (
    "resize, replace and move modules before adapters are put on them: unload() or merge_and_unload(), change the model, "
    "and wrap it again"
)


def at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, through wrappers that have its attributes; None where there is none any more.

    Nor if it is an adapted module's own base layer: somebody put it there to take the adapters away.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return None if module.__dict__.get(PLAIN) is module else module


class Bindings:
    """The way to every adapted module, and the sizes of the embedding and the head.

    resized: the paths of these two.
    """

    def __init__(self, model: nn.Module, targets: Iterable[Target], resized: Iterable[str | None]):
        self.modules = {t.path: at(model, t.path) for t in targets}
        edges: dict[int, tuple[dict, dict[str, nn.Module]]] = {}
        for path, found in self.modules.items():
            module = model
            for part in path.split(".") if path and found is not None else ():
                kept = module._modules
                module = getattr(module, part)
                if part in kept:  # else it is in what a wrapper holds
                    edges.setdefault(id(kept), (kept, {}))[1][part] = module
        self.twins = [(m, found) for m in self.modules.values() if m is not None and (found := twin(m)) is not None]
        self.edges = [(kept, (*found,), [*found.values()]) for kept, found in edges.values()]
        held = {path: m.__dict__ for path, m in self.modules.items() if path in resized and m is not None}
        self.sizes = [(path, kept, name, kept[name]) for path, kept in held.items() for name in SIZES if name in kept]

    def hold(self) -> bool:
        """At each call: a look into the dicts of the modules on the way."""
        for kept, names, modules in self.edges:
            if [*map(kept.get, names)] != modules:  # modules are equal to themselves alone
                return False
        return self.packed_as_before() and all(kept[name] == size for _, kept, name, size in self.sizes)

    def packed_as_before(self) -> bool:
        """Whether layers with packed weights have the numbers that they had: `.to()` gives them others."""
        return all([twin(module) is found for module, found in self.twins])

    def moved(self, model: nn.Module, targets: Iterable[Target], state: State) -> bool:
        """Whether some adapted module has another one in its place that can have its adapters; what is gone is gone.

        Raises TargetError for any that cannot, or that another adapted module stands in for.
        """
        bound, found = {m: path for path, m in self.modules.items() if m is not None}, not self.packed_as_before()
        for target in targets:
            module, before = at(model, target.path), self.modules[target.path]
            if module is None or before is None:
                continue
            if module is not before and module in bound:
                raise TargetError(f"{target.path}: what was {bound[module]} has come there, adapters and all: {REMEDY}")
            if module is not before:
                refuse_misfit(module, target, state)
                found = True
        for path, kept, name, size in self.sizes:
            if kept[name] != size:
                raise TargetError(f"{path}: adapted with {name}={size}, now {kept[name]}: {REMEDY}")
        return found


def refuse_misfit(module: nn.Module, target: Target, state: State) -> None:
    """Raises TargetError for a module that is not like the one for which the adapter's tensors were made."""
    record, packed = state.table[target.path], recognise(module, target.parameter)
    weight = module._parameters.get(target.parameter) if packed is None else packed
    expected = record.parameters.get(target.parameter)
    if expected is None:  # a buffer
        return
    if weight is None or tuple(weight.shape) != expected:
        now = "gone" if weight is None else f"{own_class(module).__name__} with {sizes(weight.shape)}"
        raise TargetError(f"{target.tensor_name}: adapted as {record.type} with {sizes(expected)}, now {now}: {REMEDY}")
