"""Stand-ins for packages' layers: torch's own layers over the same packed tensors, which dequantize where the weight is read.

    y = linear(x, peft_fx::dequantize([packed...], format), bias)

Models are captured, and modules traced, with these in the place of layers whose forward belongs to a package.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..kernels.packed import of
from .packed import SUFFIX, Packed
from .recognise import holding, recognise

REPACKS = frozenset({"support_avx512bf16_for_cpu"})
SOURCE = "_peft_fx_source"  # where a stand-in has, in a tuple, the module that it stands for
KNOWN = "_peft_fx_stand_in"  # where a module has its stand-in
LITERALS = (bool, int, float, str, tuple, type(None), torch.dtype)


class Linear(nn.Linear):
    """A linear layer that computes in `compute_dtype`, if it has one, or in its input's dtype; the result has the input's."""

    compute_dtype: torch.dtype | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype or input.dtype
        b = None if self.bias is None else cast(self.bias, dtype)
        return cast(nn.functional.linear(cast(input, dtype), cast(self.weight, dtype), b), input.dtype)


class Embedding(nn.Embedding):
    """Rows of the weight, for layers that say no more than that."""

    padding_idx = max_norm = None
    norm_type, scale_grad_by_freq, sparse = 2.0, False, False


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, which export would write down, and check, where it does nothing too."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def packed_parameters(module: nn.Module) -> dict[str, Packed]:
    """Name -> what keeps it, of the parameters that a module does not hold as dense tensors. Raises StorageError."""
    names = dict.fromkeys(["weight", *module._parameters, *parametrized(module)])
    return {name: found for name in names if (found := recognise(module, name)) is not None}


def parametrized(module: nn.Module) -> list[str]:
    """The parameters that `torch.nn.utils.parametrize` computes."""
    lists = module._modules.get("parametrizations")
    return [] if lists is None else list(lists._modules)


class Known:
    """What a module held when its stand-in was made, and that: at the module itself. A copy of the module knows nothing."""

    def __init__(self, held: tuple = (), found: nn.Module | None = None):
        self.held, self.found = held, found

    def __deepcopy__(self, memo: dict) -> Known:
        return Known()

    def __reduce__(self) -> tuple:
        return Known, ()


def twin(module: nn.Module) -> nn.Module | None:
    """The stand-in for a module with packed parameters, in the same mode; None for any other, and for one that is ours.

    The same one as long as the module holds the same numbers. Raises StorageError for a layer whose numbers cannot be read.
    """
    if isinstance(module, Packed) or any(isinstance(m, Packed) for m in module._modules.values()):
        return None
    known, now = vars(module).get(KNOWN), holding(module)
    if known is not None and known.held == now:
        return known.found
    vars(module).pop(KNOWN, None)
    if not (kept := packed_parameters(module)):
        return None
    vars(module)[KNOWN] = Known(now, made(module, kept))
    return vars(module)[KNOWN].found


def made(module: nn.Module, kept: dict[str, Packed]) -> nn.Module:
    """A stand-in over these packed parameters."""
    base = base_of(module, kept)
    new: nn.Module = object.__new__(reading(type(module).__name__, base, tuple(kept)))  # type: ignore[arg-type]  # classes hash
    vars(new).update({n: v for n, v in vars(nn.Module()).items() if n != "training"}, **{SOURCE: (module,)})
    own_code = not of_torch(base) and base not in (Linear, Embedding)
    for name, value in vars(module).items():
        if (
            name not in vars(new)
            and name not in ("forward", "training", KNOWN)
            and (own_code or isinstance(value, LITERALS))
        ):
            vars(new)[name] = value
    if own_code:
        new._buffers.update(module._buffers)
        new._non_persistent_buffers_set |= module._non_persistent_buffers_set
        new._modules.update({n: m for n, m in module._modules.items() if n != "parametrizations"})
    new._parameters.update({n: p for n, p in module._parameters.items() if (n not in kept and n == "bias") or own_code})
    if not own_code:
        new._parameters["bias"] = bias_of(module)
    for name, packed in kept.items():
        new._parameters.pop(name, None)
        new._modules[name + SUFFIX] = packed
    return new


def base_of(module: nn.Module, kept: dict[str, Packed]) -> type[nn.Module]:
    """The class whose forward reads the dense parameters: torch's, or the module's own where that is none of a package."""
    for packed in kept.values():
        if (said := of(packed.text)[0].layer(module)) is not None:
            return {nn.Linear: Linear, nn.Embedding: Embedding}.get(said, said)
    of_ours = next((c for c in modules(type(module)) if of_torch(c)), None)
    if of_ours is not None and not issubclass(of_ours, nn.Linear):
        return of_ours
    if of_ours is None and all(n in module._parameters or n in parametrized(module) for n in kept):
        return next(c for c in modules(type(module)) if not c.__name__.startswith("Parametrized"))
    return Linear


def modules(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """A class and the modules among its bases, nearest first."""
    return (c for c in kind.__mro__ if issubclass(c, nn.Module))


def of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.") and kind is not nn.Module


@functools.cache
def reading(name: str, base: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    """`base` under the name of a package's class, as tables and messages call it; its parameters are those of the children."""
    dense = {p: property(functools.partial(value, p + SUFFIX)) for p in parameters}
    return type(name, (base,), dense | {"training": property(mode, set_mode)})


def value(child: str, module: Any) -> torch.Tensor:
    return module._modules[child](module.training)


def mode(module: Any) -> bool:
    """A stand-in has no mode of its own: it may run long after its module was switched."""
    return module._peft_fx_source[0].training  # as an attribute: Dynamo guards on it


def set_mode(module: Any, training: bool) -> None:
    module._peft_fx_source[0].training = training


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """A layer's bias: a parameter, a buffer, or a plain attribute."""
    bias = getattr(module, "bias", None)
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)


def stay_canonical(model: nn.Module) -> None:
    """Keeps packages from repacking weights in place when a layer first runs in evaluation: switches of theirs, by name."""
    for module in model.modules():
        for switch in REPACKS & vars(module).keys():
            setattr(module, switch, False)


def open_up(model: nn.Module, paths: Iterable[str]) -> None:
    """Puts torch's own layers with dense weights in the place of those at `paths` that keep them packed."""
    for path in paths:
        if (found := twin(model.get_submodule(path))) is not None:
            model.set_submodule(path, unpacked(found))


def unpacked(found: nn.Module) -> nn.Module:
    """A stand-in's like, over dense parameters of its own."""
    new: nn.Module = object.__new__(type(found).__mro__[1])
    vars(new).update({n: v for n, v in vars(found).items() if n != SOURCE}, training=found.training)
    packed = {n.removesuffix(SUFFIX): m for n, m in found._modules.items() if isinstance(m, Packed)}
    dense = {n: nn.Parameter(m.dense(), requires_grad=False) for n, m in packed.items()}
    vars(new)["_parameters"] = {**found._parameters, **dense}
    vars(new)["_modules"] = {n: m for n, m in found._modules.items() if not isinstance(m, Packed)}
    return new


def stand_in(model: nn.Module) -> None:
    """Calls of layers with packed parameters run what stands in for them, from now on; a compiler sees operators of ours."""
    for module in model.modules():
        if (found := twin(module)) is not None:
            module.forward = found.forward


@contextmanager
def opened(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model has stand-ins in the place of layers with packed parameters. Yields the model, or its own."""
    if (own := twin(model)) is not None:
        model = own
    twins: dict[nn.Module, nn.Module | None] = {}
    places = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child not in twins:
                twins[child] = twin(child)
            if child is not None and twins[child] is not None:
                places.append((parent._modules, name, child))
    for modules, name, child in places:
        modules[name] = twins[child]
    try:
        yield model
    finally:
        for modules, name, child in places:
            modules[name] = child
