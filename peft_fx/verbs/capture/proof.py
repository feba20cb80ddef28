"""Whether a graph computes what its model does, or the model the same in both modes, by structure: it holds without numbers too.

Both run once each on fake tensors. Every tensor gets a number, as in a compiler's value numbering: of its operator,
its literals and the numbers of what it was made from. Parameters and inputs are the same for both, so outputs with the same
number are the same expression of the same tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ...errors import CaptureError, GraphError
from ...store.closing import packed_weights
from ...store.lazy import copy_graph, graph_to_read
from ...store.tensors import store_of
from .trace import in_mode, quiet_cache, refusals


def refuse_difference(model: nn.Module, gm: fx.GraphModule, args: tuple, kwargs: dict) -> None:
    """Raises GraphError unless the graph's outputs and writes are the model's, operator by operator, in eval mode (a graph that
    is locked to its mode: in that one)."""
    training = bool(store_of(gm).mode.locked) and gm.training
    try:
        with torch.enable_grad():
            expected, found = numbers(model, ((model, training), (as_written(gm), training)), args, kwargs)
    except (RuntimeError, TypeError) as error:  # operators and tensors that have no fake, or no rule for modes
        raise GraphError(f"model and graph cannot be compared: {type(error).__name__}: {error}") from error
    if expected != found:
        raise GraphError("the graph does not give the model's outputs on the example")


def as_written(gm: fx.GraphModule) -> fx.GraphModule:
    """A module that runs the graph as it is: the code of a lazy one takes packed weights, where the model dequantizes."""
    return fx.GraphModule(gm, copy_graph(graph_to_read(gm))) if packed_weights(graph_to_read(gm)) else gm


def modes_agree(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether the model computes and writes the same in both modes, so that one export is that of both."""
    try:
        with refusals(model, training=True), torch.enable_grad():
            evaluation, training = numbers(model, ((model, False), (model, True)), args, kwargs)
    except CaptureError:  # the export in train mode says why, if it fails too
        return False
    return evaluation == training


def numbers(model: nn.Module, runs: tuple, args: tuple, kwargs: dict) -> list[list[int]]:
    """Per run, a module over the model's tensors and its mode: the numbers of its outputs, then of the model's tensors and the
    inputs after it. Constants that a module alone holds stay real."""
    known, fakes, results = Numbers(), FakeTensorMode(allow_non_fake_inputs=True), []
    with quiet_cache(model), fakes, exporting():
        real = *(holder[name] for holder, name in held(model)), *tensors((args, kwargs))
        made: dict[torch.Tensor, torch.Tensor] = {
            tensor: fakes.from_tensor(tensor, static_shapes=True) for tensor in real
        }
        for index, tensor in enumerate(made.values()):
            known.find(tensor, "given", index)
        given = pytree.tree_map(lambda x: made[x] if isinstance(x, torch.Tensor) else x, (args, kwargs))
        start = dict(known.memory)
        for module, training in runs:
            with in_mode(module, training), in_place_of(made, module), known:
                output = module(*given[0], **given[1])
            output = dict(output) if isinstance(output, dict) else output
            results.append([known.of(tensor) for tensor in (*tensors(output), *made.values())])
            known.memory = dict(start)
    return results


def held(module: nn.Module) -> list[tuple[dict, str]]:
    """Where a module's parameters and buffers are, each place once."""
    holders = (holder for m in module.modules() for holder in (m._parameters, m._buffers))
    return [(holder, name) for holder in holders for name, tensor in holder.items() if tensor is not None]


@contextlib.contextmanager
def in_place_of(made: dict[torch.Tensor, torch.Tensor], module: nn.Module) -> Iterator[None]:
    """The module with fakes in its tensors' places. Afterwards nothing of it has changed, whatever its forward stores in it.

    `functional_call` would leave fakes in a module that has two names.
    """
    module.forward  # noqa: B018  a graph makes its code at the first look, and keeps what belongs to it
    kept = [(d, dict(d)) for m in module.modules() for d in (m._parameters, m._buffers, vars(m))]
    try:
        for holder, name in held(module):
            holder[name] = made.get(holder[name], holder[name])
        yield
    finally:
        for d, before in kept:
            d.clear()
            d.update(before)


def tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """What a model asks torch before it takes shortcuts that depend on values: it takes none, as when it was captured."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = {name: getattr(torch.compiler, name) for name in flags}
    for name in flags:
        setattr(torch.compiler, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


# Capture writes the second where a model that runs has the first: a constant of the code is met.
ALIKE = {torch.ops.aten.lift_fresh_copy.default: torch.ops.aten.lift_fresh.default}


class Numbers(TorchDispatchMode):
    """Numbers the memory of tensors by the expressions that wrote it, while entered; equal expressions have equal numbers.

    A tensor is its memory's number, what it shows of it, and whether gradients flow back from it: views need no rule, a write is
    seen through all of them, and a detached tensor is another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.expressions: dict[tuple, int] = {}
        self.memory: dict[int, int] = {}
        self.held: list[torch.Tensor] = []  # so that no other memory gets an address that is known

    def number(self, *expression: object) -> int:
        return self.expressions.setdefault(expression, len(self.expressions))

    def write(self, tensor: torch.Tensor, *expression: object) -> None:
        """Says what the memory behind a tensor holds."""
        self.held.append(tensor)
        self.memory[address(tensor)] = self.number(*expression)

    def find(self, tensor: torch.Tensor, *expression: object) -> None:
        """The same of memory that is met for the first time."""
        if address(tensor) not in self.memory:
            self.write(tensor, *expression)

    def of(self, tensor: torch.Tensor) -> int:
        """A tensor's number. Of a constant that the code holds it is its values'."""
        if address(tensor) not in self.memory:
            self.write(tensor, "constant", constant(tensor))
        shown = tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset()
        return self.number(
            self.memory[address(tensor)], *shown, tensor.is_conj(), tensor.is_neg(), tensor.requires_grad
        )

    def key(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.of(value)
        if isinstance(value, (tuple, list)):
            return tuple(map(self.key, value))
        if isinstance(value, dict):
            return tuple((name, self.key(v)) for name, v in value.items())
        return type(value), str(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        expression = ALIKE.get(func, func), self.key(args), self.key(kwargs)
        output = func(*args, **kwargs)
        schema = func._schema.arguments if isinstance(func, OpOverload) and func._schema.is_mutable else ()
        for place, argument in enumerate(schema):
            if argument.is_write:
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                for index, tensor in enumerate(tensors(written)):
                    self.write(tensor, *expression, place, index)
        for index, tensor in enumerate(tensors(output)):
            self.find(tensor, *expression, index)
        return output


def constant(tensor: torch.Tensor) -> Any:
    """What tells a constant from others of its shape: its values, if it has any."""
    if type(tensor) is not torch.Tensor:
        return id(tensor)
    with _disable_current_modes():
        return None if tensor.is_meta else str(tensor.tolist())


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
