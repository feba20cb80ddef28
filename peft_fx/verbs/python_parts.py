"""What Dynamo leaves to Python: whole functions, where a graph break lies in a loop. No backend sees their operators.

`left_to_python` notices it when something that such a function calls is compiled. `Hooks` adapt it, in the weight form: the
module that owns a target has W' in place of W while its forward runs.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import fx, nn
from torch._dynamo import OptimizedModule
from torch.utils.hooks import RemovableHandle

from ..errors import GraphError
from ..passes.lowering import weight_function
from ..planning.plan import Placement
from ..store import ADAPTERS, get_tensor


def running() -> Iterator[tuple[nn.Module, object]]:
    """(module, code) of the methods of modules on the Python stack, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(module, nn.Module):
            yield module, code
        frame = frame.f_back


def compiled_module() -> nn.Module | None:
    """The outermost module on the stack that `torch.compile` or its own `compile` was called on."""
    found = None
    for module, _ in running():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            found = module
    return getattr(found, "_orig_mod", found)


def left_to_python(model: nn.Module, owners: Collection[nn.Module]) -> str:
    """Path of a module on the stack whose forward runs as written and uses one of `owners` itself; "" if there is none.

    What Dynamo compiles runs another code object.
    """
    for module, code in running():
        if code in forward_codes(module) and any(m in owners for m in used_by(module)):
            path = next((path for path, m in model.named_modules() if m is module), None)
            if path is not None:
                return path or type(model).__name__
    return ""


def forward_codes(module: nn.Module) -> Iterator[object]:
    """The code of a module's forward, and of what decorators have wrapped."""
    function = type(module).forward
    while function is not None:
        yield getattr(function, "__code__", None)
        function = getattr(function, "__wrapped__", None)


def used_by(module: nn.Module) -> Iterator[nn.Module]:
    """The module and what it holds of torch.nn's: only modules of other packages are functions of their own to Dynamo."""
    yield module
    for child in module.children():
        if type(child).__module__.startswith("torch.nn."):
            yield from used_by(child)


class Hooks:
    """Forward hooks on the modules that own targets. They act in Python under a compiled call, nowhere else."""

    def __init__(self, adapters: fx.GraphModule, acting: Callable[[], Sequence[Placement]]):
        """acting: gives the placements that act now."""
        self.adapters, self.acting = adapters, acting
        self.paths: dict[nn.Module, str] = {}
        self.saved: dict[nn.Module, list[dict[str, torch.Tensor | None]]] = {}

    def install(self, model: nn.Module, paths: Collection[str]) -> None:
        """One hook and one id for all modules: Dynamo guards on both, and would compile a layer's graph anew for each layer."""
        self.paths = {model.get_submodule(path): path for path in paths}
        before, after, id = self.before, self.after, RemovableHandle(OrderedDict()).id
        for module in self.paths:
            module._forward_pre_hooks[id], module._forward_hooks[id] = before, after
            module._forward_hooks_always_called[id] = True

    def __deepcopy__(self, memo):
        return Hooks(self.adapters, self.acting)  # hooks of a copied model, which has no adapters

    def __reduce__(self):
        return Hooks, (None, tuple)

    def before(self, module: nn.Module, args) -> None:
        if torch.compiler.is_compiling() or module not in self.paths or compiled_module() is None:
            return
        outer = self.saved.setdefault(module, [])
        outer.append(dict(module._parameters))
        if len(outer) == 1:
            for p in self.acting():
                if p.target.path == self.paths[module]:
                    adapt(module, p, self.adapters)

    def after(self, module: nn.Module, args, result) -> None:
        if not torch.compiler.is_compiling() and self.saved.get(module):
            module._parameters.update(self.saved[module].pop())


def adapt(module: nn.Module, p: Placement, adapters: fx.GraphModule) -> None:
    """Puts W' in the place of a module's parameter. Raises GraphError where no weight stands for the method."""
    method, target = p.rule, p.target
    lost = method.activation_only(target, p.config)
    if module.training and (dropout := method.input_dropout(target, p.config)):
        lost = f"dropout {dropout} on the input"
    if lost or method.dense_groups(target):
        raise GraphError(
            f"{target.name}: {lost or 'an update across groups'} needs the operator in a graph, and Dynamo left it to Python "
            "(TORCH_LOGS=graph_breaks says why)"
        )
    shared = {name: p.resolve(name) for name in p.tensors}
    theta = [get_tensor(adapters, f"{ADAPTERS}.{s.name}") for s in shared.values()]
    theta = [t.t() if s.transposed else t for t, s in zip(theta, shared.values(), strict=True)]
    function = weight_function(method, target, p.config, tuple(shared), None if module.training else method.weight)
    W, b = module._parameters[target.parameter], module._parameters.get(target.bias)
    module._parameters[target.parameter], new_b = function(W.detach(), None if b is None else b.detach(), *theta)
    if target.bias in module._parameters:
        module._parameters[target.bias] = new_b
