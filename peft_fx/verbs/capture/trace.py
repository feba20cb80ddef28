"""The tracer: `torch.export`, non-strict. Kept thin, since capture is the part most likely to be replaced."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from ...errors import CaptureError
from .examples import is_hugging_face
from .quiet import brief, quiet_export


def export_in_mode(model: nn.Module, args: tuple, kwargs: dict, dynamic_shapes: Any, training: bool) -> ExportedProgram:
    """Exports `model` in the given mode and restores the mode of every module.

    Raises CaptureError naming the innermost module that was being traced.
    """
    with refusals(model, training), in_mode(model, training), torch.enable_grad(), quiet_cache(model), quiet_export():
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


@contextlib.contextmanager
def refusals(model: nn.Module, training: bool) -> Iterator[None]:
    """Whatever a model's code or torch raises while it is traced, as a CaptureError."""
    try:
        yield
    except Exception as error:
        raise CaptureError(explain(model, error, training)) from brief(error)


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in the given mode; afterwards every module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def quiet_cache(model: nn.Module) -> Iterator[None]:
    """Turns `use_cache` off in every config of a Hugging Face model while tracing: a graph has no growing cache to return.

    Sub-modules may hold copies of their own: T5's stacks do.
    """
    configs: list[Any] = []
    if is_hugging_face(model):
        found = [getattr(module, "config", None) for module in model.modules()]
        found += [getattr(c, name, None) for c in found for name in getattr(c, "sub_configs", {})]
        configs = [c for c in found if getattr(c, "use_cache", False)]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


def separate(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Clones example tensors that share memory: export would merge them into one input, silently."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    seen: set = set()
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()._cdata
            if storage in seen:
                leaves[i] = leaf.clone()
            seen.add(storage)
    return pytree.tree_unflatten(leaves, spec)


def auto_shapes(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """`Dim.AUTO` for every axis of every example tensor, by argument name: what the model fixes is found out by export."""

    def shape(leaf: Any) -> Any:
        return (Dim.AUTO,) * leaf.dim() if isinstance(leaf, torch.Tensor) else None

    return pytree.tree_map(shape, dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))


ON_VALUES = (
    "the model branches on tensor values, or makes Python numbers of them; rewrite the branch with torch.where, "
    "or pin the value by a config option"
)
FIXED = (
    "dynamic_shapes asks for sizes that the model's code, or a size of 1 in the example, fixes; leave them out there"
)
# What commonly stops a trace -> what to do about it.
REMEDIES = (
    ("data-dependent", ON_VALUES),
    ("GuardOnDataDependent", ON_VALUES),
    ("Could not guard", ON_VALUES),
    ("numpy", "the model leaves torch for numpy in this mode (masking while training, say); try model.eval()"),
    ("Must provide a tree_name", "torch.export gives no dynamic sizes to arguments taken by **kwargs; pass dynamic_shapes=None"),
    ("Constraints violated", FIXED),
    ("conflicts between user-specified", FIXED),
    ("missing", "pass example inputs: capture(model, args=(...), kwargs={...})"),
)  # fmt: skip


def explain(model: nn.Module, error: Exception, training: bool) -> str:
    """One line: the model, the module that was running, the cause, the remedy."""
    module = innermost_module(model, error)
    cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = f"{type(error).__name__} {error}"
    remedy = next(
        (r for key, r in REMEDIES if key in text), "capture a sub-module, or rewrite the operation for torch.export"
    )
    return (
        f"{type(model).__name__} cannot be captured in {'train' if training else 'eval'} mode: in module "
        f"{module or '(the model itself)'}: {type(error).__name__}: {cause[:300]}. Remedy: {remedy}"
    )


def innermost_module(model: nn.Module, error: BaseException) -> str:
    """Path and class of the last module on the error's stack."""
    paths = {id(m): path for path, m in model.named_modules()}
    found = ""
    chain: BaseException | None = error
    while chain is not None:
        frame = chain.__traceback__
        while frame is not None:
            owner = frame.tb_frame.f_locals.get("self")
            if path := paths.get(id(owner)):
                found = f"{path} ({type(owner).__name__})"
            frame = frame.tb_next
        chain = chain.__cause__
    return found
