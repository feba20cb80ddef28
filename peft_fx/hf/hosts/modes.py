"""Work that is no part of the call which needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch._C import _autograd
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def no_modes() -> Iterator[None]:
    """Inside the block nothing of the caller's sees what runs: proxies, fakes, counters of operators, torch.func's transforms,
    what checkpoints do with saved tensors."""
    with ExitStack() as stack:
        for modes in (disable_proxy_modes_tracing(), _disable_current_modes(), temporarily_clear_interpreter_stack()):
            stack.enter_context(modes)
        if (why := _autograd._saved_tensors_hooks_get_disabled_error_message()) is not None:  # torch.func's
            _autograd._saved_tensors_hooks_enable()
            stack.callback(_autograd._saved_tensors_hooks_disable, why)
        stack.enter_context(saved_tensors_hooks(lambda t: t, lambda t: t))
        yield
