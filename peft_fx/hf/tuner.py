"""`Tuner`: a model whose calls go through the Dynamo front end, and its adapters; what PEFT calls `base_model`.

The model stays the object that it was: `model.compile(backend=...)` makes its own calls run adapted, those of `generate` too.
Merging writes into its parameters, and keeps what was there, so that unmerging changes no bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..config import AdapterConfig
from ..store import Resident, get_tensor, owner_of
from ..verbs.backend import Backend
from ..verbs.combine import Combination, combined
from ..verbs.derive import placements
from ..verbs.merge import by_target, folded, refuse_no_weight
from .hosts import Hosts


class Tuner(nn.Module):
    """A model and the adapters of one `Backend`."""

    def __init__(self, model: nn.Module, backend: Backend):
        super().__init__()
        self.model = model
        self.__dict__["backend"] = backend  # holds the model: no child
        self.enabled = True
        self.merged_adapters: tuple[str, ...] = ()
        self.chosen = backend.active
        self.__dict__["replaced"] = {}
        self.__dict__["hosts"] = Hosts(model, backend)
        self.refresh()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.backend.keep(self.backend.adapters)  # a copied graph module has the adapters, but not the model's tree
        self.refresh()

    def refresh(self) -> None:
        """After adapters came or went: their tensors are parameters of this module, those that should act do, at all calls."""
        self.adapters = self.backend.adapters.peft_fx.adapters
        acting = tuple(n for n in self.chosen if self.enabled and n not in self.merged_adapters)
        self.backend.set_adapter(acting)
        self.hosts.refresh(acting)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    # Which adapters there are and act

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        return {name: resident.config for name, resident in self.backend.state.recipe.items()}

    @property
    def active_adapters(self) -> list[str]:
        return list(self.chosen)

    def add(self, name: str, config: AdapterConfig, source: tuple | None = None, trainable: bool = True) -> None:
        """source: (file's tensors, where), None for initial values. It does not act until `set_adapter`."""
        self.backend.add(name, Resident(config), source, trainable)
        self.refresh()

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str,
                             combination_type: str = "svd", **options) -> None:  # fmt: skip
        """A new LoRA adapter, made of others as `peft_fx.combine` makes it; it does not act until `set_adapter`."""
        self.known(adapters)
        if adapter_name in self.peft_config:
            return
        config, tensors = combined(self.backend.adapters, adapters, weights, Combination(combination_type, **options))
        self.add(adapter_name, config, (tensors, "the combination"))

    def set_adapter(self, names: str | Iterable[str], inference_mode: bool = False) -> None:
        """These act, in order, and alone are trainable, unless inference_mode. Merged adapters are unmerged first."""
        names = (names,) if isinstance(names, str) else tuple(names)
        self.known(names)
        if self.merged_adapters:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            self.unmerge_adapter()
        self.chosen = names
        self.refresh()
        for name in self.peft_config:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, names: str | Iterable[str], requires_grad: bool = True) -> None:
        for name in (names,) if isinstance(names, str) else names:
            self.known((name,))
            tree = self.adapters._modules.get(name)
            for parameter in tree.parameters() if tree is not None else ():
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, name: str) -> None:
        self.known((name,))
        if name in self.merged_adapters:
            raise ValueError(f"adapter {name!r} is merged: call unmerge_adapter() before deleting it")
        self.backend.delete(name)
        self.chosen = tuple(n for n in self.chosen if n != name)
        if not self.chosen and (left := list(self.peft_config)):
            self.chosen = (left[0],)
            warnings.warn(f"Adapter {name} was active and is deleted; now {left[0]} is.", stacklevel=3)
        self.refresh()

    def known(self, names: Iterable[str]) -> None:
        """Raises ValueError for a name that no adapter has."""
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} not found; there are: {', '.join(self.peft_config) or 'none'}")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the block, merged weights taken out too."""
        merged = self.merged_adapters
        self.unmerge_adapter()
        self.enabled = False
        self.refresh()
        try:
            yield
        finally:
            self.enabled = True
            self.refresh()
            if merged:
                self.merge_adapter(list(merged))

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Folds adapters, None: the active ones, into the model's parameters. safe_merge: refuse inf and nan."""
        names = tuple(adapter_names or self.chosen)
        self.known(names)
        if again := [n for n in names if n in self.merged_adapters]:
            warnings.warn(f"Already merged, left as they are: {', '.join(again)}.", stacklevel=3)
        names = tuple(n for n in names if n not in self.merged_adapters)
        state = self.backend.state
        chosen = [p for name in names for p in placements(state, name)]
        refuse_no_weight(chosen)
        results = {}
        for group in by_target(chosen).values():
            found, _ = folded(self.backend.adapters, group, safe_merge)
            results |= found
        with self.backend.adapters.peft_fx.sharing.writing(results.values()):
            for name, value in results.items():
                self.replace(name, value)
        self.merged_adapters += names
        self.refresh()

    def replace(self, name: str, value: torch.Tensor) -> None:
        """`value` in place of a parameter of the model, which is kept for `unmerge_adapter`."""
        old = get_tensor(self.model, name)
        tied = bool(self.backend.state.table.tied_to(name))
        if old is not None and old.shape == value.shape and not tied:
            self.replaced.setdefault(name, old.detach().clone())
            with torch.no_grad():
                old.copy_(value)
        else:  # a weight that others share, a bias that there was none of, a convolution that loses its groups
            self.replaced.setdefault(name, old)
            self.put(name, nn.Parameter(value, requires_grad=False))

    def put(self, name: str, parameter: nn.Parameter | None) -> None:
        """Another Parameter under a name of the model's, None to take it away."""
        for root in (self.model, self.backend.adapters):
            owner, leaf = owner_of(root, name)
            owner._parameters[leaf] = parameter
        owner = owner_of(self.model, name)[0]
        if parameter is not None and parameter.dim() > 2 and hasattr(owner, "groups"):
            owner.groups = owner.in_channels // parameter.shape[0 if owner.transposed else 1]

    def unmerge_adapter(self) -> None:
        """The model's parameters as they were before the merge, bit for bit."""
        for name, old in self.replaced.items():
            if old is None or isinstance(old, nn.Parameter):
                self.put(name, old)
            else:
                with torch.no_grad():
                    get_tensor(self.model, name).copy_(old)
        self.replaced.clear()
        self.merged_adapters = ()
        self.refresh()

    def unload(self) -> nn.Module:
        """The model, called as before it had adapters."""
        self.hosts.close()
        return self.model

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names=None) -> nn.Module:
        """The model with adapters folded in, and nothing else left of them."""
        self.merge_adapter(adapter_names, safe_merge)
        return self.unload()
