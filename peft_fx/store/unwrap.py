"""Models inside of the wrappers that torch puts around them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# what torch.compile and FSDP 1 call the module that they wrap
INNER = ("_orig_mod", "_fsdp_wrapped_module")
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def wrappers(model) -> Iterator:
    """The model, what it wraps, what that wraps, ...

    A wrapper's own part is looked for, since a PeftModel passes on the attributes of a compiled model inside of it.
    """
    while model is not None:
        yield model
        parts = getattr(model, "_modules", {})
        parallel = parts.get("module") if isinstance(model, PARALLEL) else None
        package = getattr(model, INNER[0], None) if isinstance(vars(type(model)).get(INNER[0]), property) else None
        model = next((parts[name] for name in INNER if name in parts), parallel or package)


def unwrapped(model):
    """What torch.compile, FSDP 1 and data parallelism have wrapped, in any order."""
    return [model, *wrappers(model)][-1]


def is_compiled(model) -> bool:
    """Whether torch.compile's result, or a module compiled in place, is the model or around it."""
    return any("_orig_mod" in getattr(m, "_modules", {}) or is_compiled_in_place(m) for m in wrappers(model))


def is_compiled_in_place(module) -> bool:
    """Whether `module.compile()` was called. The face's lock has the same place."""
    call = getattr(module, "_compiled_call_impl", None)
    return call is not None and not getattr(call, "is_lock", False)
