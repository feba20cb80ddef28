"""`Tuner`: a model and its adapters; what PEFT calls `base_model`.

The model stays the object that it was: its adapted modules run graphs of their own (`hosts.py`), whoever calls them. Merging
writes into its parameters, and keeps what was there, so that unmerging changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from textwrap import indent

import torch
from rich.progress import track
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from ...config import AdapterConfig
from ...engine.derive import derived, frozen, placements
from ...engine.merging import by_target, folded, refuse_no_weight
from ...engine.swaps import SwapReport
from ...errors import AdapterNameError, MergeError, RecipeError, TargetError, WrongTypeError
from ...notices import warn
from ...planning.plan import clashes
from ...recipe import as_config
from ...store.state import Resident, state_of
from ...store.tensors import ADAPTERS, get_tensor
from ...store.unwrap import unwrapped
from ...suggestions import did_you_mean
from ...target import Target
from ...training.allocators import Allocator, allocators, penalty, work_of
from ...verbs.backend import Backend
from ...verbs.capture.model import capture
from ...verbs.combine import weighted
from ...verbs.tensors import INJECTED, no_adapters
from ..hosts.dropout import dropouts
from ..hosts.hosts import BASE, Hosts, hosts_in, take_over
from ..hosts.replaced import Replaced
from ..hosts.replication import deeper, is_deeper, shallow
from .configs import Configs

DEFAULT = "default"
CHILD = "peft_adapters"  # its submodule that holds the adapters' tensors then
PREFIX = "adapters."  # in the names of their parameters, whatever the model is inside of
IN_MODEL = f"base_model.{PREFIX}"  # where the state dict of a PeftModel has them


class Tuner(nn.Module):
    """A model, adapted in place, and its adapters.

    peft_config: a config of ours, of PEFT's, a dict, or a dict of these by adapter name. source: (tensors, where from, whether
    initial values are drawn first) of a file. Raises RecipeError, a ValueError, where nothing matches or a target is refused.
    """

    peft_type: str | None = None  # of its adapters; None: any
    prefix = PREFIX

    def __init__(self, model: nn.Module, peft_config, adapter_name: str = DEFAULT, low_cpu_mem_usage: bool = False, *,
                 source: tuple | None = None, trainable: bool = True):  # fmt: skip
        super().__init__()
        if isinstance(peft_config, dict) and "peft_type" not in peft_config and adapter_name in peft_config:
            peft_config = peft_config[adapter_name]
        config = as_config(peft_config)
        if self.peft_type not in (None, config.peft_type):
            raise RecipeError(f"{self._get_name()} has {self.peft_type} adapters, and the config is for {config.peft_type}: take "
                              "get_peft_model, which finds the class, or the class for this config")  # fmt: skip
        refuse_adapted(model, config)
        backend = Backend([(adapter_name, config, source)], trainable=trainable)
        with deeper(model, config):
            backend.attach(model, frames=False, deeper=True)
        take_over(model)  # not before: the config may have been refused
        model.requires_grad_(False)
        self.model = model
        self.training = model.training
        self.__dict__["backend"] = backend  # holds the model: no child
        self.configs = Configs()
        self.peft_config.adopt(adapter_name, peft_config)
        self.enabled = True
        self.merged_adapters: tuple[str, ...] = ()
        self.chosen = backend.active
        self.dropouts = nn.ModuleList()
        self.__dict__["replaced"] = Replaced(model, backend)
        self.forget_importance()
        self.__dict__["hosts"] = Hosts(model, backend)
        self.refresh()

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "work": {}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "_modules" in self.model.__dict__:  # not while a model is copied that holds its tuner
            self.hosts.lock()

    def refresh(self) -> None:
        """After adapters came or went: their tensors are parameters of this module, those that should act do, at all calls."""
        self.adapters = self.backend.adapters.peft_fx.adapters
        self.configs.synced(self.backend.state)
        self.dropouts = nn.ModuleList(dropouts(self, self.dropouts))
        if INJECTED in self.model.__dict__:
            self.model.add_module(CHILD, self.adapters)
        acting = tuple(n for n in self.chosen if self.enabled and n not in self.merged_adapters)
        self.backend.set_adapter(acting)
        self.hosts.refresh(acting)
        self.penalised = any(work.penalty for work in work_of(self.backend.adapters).values())

    def forward(self, *args, adapter_names: list[str] | None = None, **kwargs):
        if adapter_names is None:
            return self.with_penalty(self.model(*args, **kwargs))
        with self.by_rows(adapter_names, (args, kwargs)):
            return self.model(*args, **kwargs)

    def with_penalty(self, outputs):
        """The model's outputs, their loss with what the methods of the active adapters add to it."""
        if self.penalised and getattr(outputs, "loss", None) is not None:
            outputs.loss = outputs.loss + penalty(self.backend.adapters)
        return outputs

    def generate(self, *args, adapter_names: list[str] | None = None, **kwargs):
        if adapter_names is None:
            return self.model.generate(*args, **kwargs)
        with self.by_rows(adapter_names, (args, kwargs)):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def by_rows(self, names: list[str], inputs: tuple) -> Iterator[None]:
        """Inside the block each row of a batch goes through the adapter named for it, "__base__" for none.

        Raises ValueError in training, for merged adapters, unknown names, and another number of names than rows.
        """
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call eval() first")
        if self.merged_adapters:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters: call unmerge_adapter() first")
        if isinstance(names, str):
            raise WrongTypeError(f"adapter_names: expected a list with a name for each row, got {names!r}")
        self.known(n for n in names if n != BASE)
        first = next((x for x in tree_leaves(inputs) if torch.is_tensor(x) and x.dim()), None)
        if first is not None and len(first) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(first)} respectively."
            )
        with self.hosts.by_rows(names) if self.enabled else nullcontext():
            yield

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def __repr__(self) -> str:
        """The model, and a line per adapter."""
        lines = [f"(model): {self.model}", *(f"({name}): {self.described(name)}" for name in self.names)]
        return f"{self._get_name()}(\n{indent(chr(10).join(lines), '  ')}\n)"

    def described(self, name: str) -> str:
        found = [p.target.name for p in placements(self.backend.state, name)]
        does = "merged" if name in self.merged_adapters else "acts" if name in self.backend.active else "does not act"
        tensors = list(self.adapters._modules.get(name, nn.Module()).parameters())
        count, trained = sum(p.numel() for p in tensors), sum(p.numel() for p in tensors if p.requires_grad)
        targets = f"{len(found)} targets ({' ... '.join(dict.fromkeys((*found[:1], *found[-1:])))})"
        return f"{self.peft_config[name].peft_type}, {does}, on {targets}, {count:,} parameters, {trained:,} trainable"

    # Which adapters there are and act

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """Adapter name -> the config that its caller gave, filled in. Edits are for files, and change no call."""
        return self.configs.synced(self.backend.state)

    @property
    def names(self) -> list[str]:
        """Those of the adapters, without those that somebody took out of `peft_config`."""
        return [name for name in self.backend.state.recipe if name in self.peft_config]

    @property
    def active_adapters(self) -> list[str]:
        return list(self.chosen)

    active_adapter = active_adapters  # PEFT's tuners have both

    @property
    def targets(self) -> list[Target]:
        """What some adapter is on."""
        return [p.target for name in self.names for p in placements(self.backend.state, name)]

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the modules that some adapter is on."""
        return list(dict.fromkeys(t.path for t in self.targets if not t.by_parameter))

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Names of the parameters that `target_parameters` of some adapter chose."""
        return list(dict.fromkeys(t.tensor_name for t in self.targets if t.by_parameter))

    def disable_adapter_layers(self) -> None:
        """The base model, merged weights taken out too, until `enable_adapter_layers`."""
        if self.merged_adapters:
            self.unmerge_adapter()
        self.enabled = False
        self.refresh()

    def enable_adapter_layers(self) -> None:
        self.enabled = True
        self.refresh()

    def add(self, name: str, config: AdapterConfig, source: tuple | None = None, trainable: bool = True) -> None:
        """source: what `Source` takes, None for initial values. It does not act until `set_adapter`."""
        self.unmerge_first("added")  # it may start from the base's weights
        if name in self.backend.state.recipe and name not in self.peft_config:
            self.backend.delete(name)  # nobody can name it any more
            self.configs.synced(self.backend.state)
        self.backend.add(name, Resident(config), source, trainable)
        self.refresh()
        if source is None and name not in self.chosen:
            self.set_requires_grad(name, False)

    def cast_to_base(self, name: str) -> None:
        """An adapter's tensors in the dtype of the weights that they are for, but for scalars, which no product meets."""
        for p in placements(self.backend.state, name):
            dtype = get_tensor(self.model, p.target.tensor_name).dtype
            for key, spec in p.tensors.items():
                tensor = get_tensor(self.backend.adapters, f"{ADAPTERS}.{p.resolve(key).name}")
                numbers = tensor.is_floating_point() and dtype.is_floating_point and spec.dtype is None
                if numbers and (spec.trainable or tensor.dim()):
                    tensor.data = tensor.data.to(dtype)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str,
                             combination_type: str | None = None, *options, **named) -> None:  # fmt: skip
        """A new LoRA adapter, made of others as `peft_fx.combine` makes it; it does not act until `set_adapter`.

        Options are those of `Combination`, in its order. Where neither they nor a combination_type are given, IA3 adapters
        become one IA3 adapter with the sum of their scales.
        """
        self.known(adapters)
        if adapter_name in self.peft_config:
            return
        config, tensors = weighted(self.backend.adapters, adapters, weights, combination_type, *options, **named)
        self.add(adapter_name, config, (tensors, "the combination", True), trainable=False)

    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        """These act, in order, and alone are trainable, unless inference_mode. Merged adapters are unmerged first."""
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self.known(names)
        self.refuse_clashes(names)
        self.unmerge_first("set")
        self.chosen = names
        self.refresh()
        for name in self.names:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.known((name,))
            tree = self.adapters._modules.get(name)
            for parameter in tree.parameters() if tree is not None else ():
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        self.refuse_to_delete((adapter_name,))
        self.backend.delete(adapter_name)
        self.work.pop(adapter_name, None)
        self.chosen = tuple(n for n in self.chosen if n != adapter_name)
        if not self.chosen and self.names:
            new = min(self.names)  # PEFT's choice
            self.chosen = (new,)
            self.set_requires_grad(new)
            warn(f"Adapter {adapter_name} was active and is deleted; now {new} is.")
        self.refresh()

    def refuse_to_delete(self, names: Iterable[str]) -> None:
        """Raises AdapterNameError, a ValueError, for an unknown adapter, MergeError, another one, for a merged one."""
        self.known(names)
        if merged := [name for name in names if name in self.merged_adapters]:
            raise MergeError(f"adapter {', '.join(merged)} is merged: call unmerge_adapter() before deleting it")

    def known(self, names: Iterable[str]) -> None:
        """Raises AdapterNameError, a ValueError, for a name that no adapter has."""
        there = self.names
        for name in names:
            if not isinstance(name, str):
                raise WrongTypeError(f"adapter names are strings, got {name!r}")
            if name not in there:
                hint = did_you_mean(name, there)
                raise AdapterNameError(f"Adapter {name} not found; there are: {', '.join(there) or 'none'}{hint}")

    def refuse_clashes(self, names: Iterable[str]) -> None:
        """Raises TargetError, a ValueError, for adapters that each bring their own numbers for one weight."""
        if found := clashes(p for name in names for p in placements(self.backend.state, name)):
            raise TargetError("\n  ".join(["these adapters cannot act together: set one of them", *map(str, found)]))

    def unmerge_first(self, done: str) -> None:
        if self.merged_adapters:
            text = f"Adapter cannot be {done} when the model is merged. Unmerging the model first."
            warn(text)
            self.unmerge_adapter()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the block, merged weights taken out too; afterwards what was before, in nested blocks too."""
        merged, enabled = self.merged_adapters, self.enabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if enabled:
                self.enable_adapter_layers()
            if merged:
                self.merge_adapter(list(merged))

    def to_graph(self, args: tuple = (), kwargs: dict | None = None, **options) -> fx.GraphModule:
        """A captured graph of the model with these adapters, for the verbs: compile, merge, export, package, reserve, ...

        The arguments are those of `peft_fx.capture`. Graph and model share tensors and the lock: what is swapped or trained
        in one is so in the other.
        """
        with self.disabled(), self.hosts.away():
            captured = capture(self.model, args, kwargs, **options)
        ours = self.backend.adapters
        gm = frozen(captured)
        gm.peft_fx.adapters, gm.peft_fx.sharing = ours.peft_fx.adapters, ours.peft_fx.sharing
        return derived(gm, state_of(gm).update(recipe=dict(self.backend.state.recipe), active=self.backend.active))

    # Training

    @property
    def allocators(self) -> dict[str, Allocator]:
        """Of the adapters that act and have work besides their optimiser's."""
        self.work |= allocators(self.backend.adapters, self.work)
        return {name: self.work[name] for name in work_of(self.backend.adapters)}

    def update_and_allocate(self, global_step: int) -> None:
        """Call once per training step, between `optimizer.step` and `zero_grad`."""
        for allocator in self.allocators.values():
            allocator.update_and_allocate(global_step)

    def forget_importance(self) -> None:
        """Allocators begin anew."""
        self.__dict__["work"] = {}

    # Merging

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, progressbar: bool = False
    ) -> None:
        """Folds adapters, None: the active ones, into the model's parameters. safe_merge: refuse inf and nan."""
        if isinstance(adapter_names, str):
            raise WrongTypeError(f"adapter_names: expected a list of names, got {adapter_names!r}")
        if is_deeper(self.model):
            raise MergeError(
                "Cannot merge LORA layers when base model layers are replicated: copies of a layer share one weight, which would "
                "get the updates of them all. peft_fx.merge(model.to_graph(...), untie=True) gives each a weight of its own"
            )
        names = tuple(adapter_names or self.chosen)
        self.known(names)
        names = tuple(n for n in names if n not in self.merged_adapters)
        self.refuse_clashes((*self.merged_adapters, *names))
        if self.merged_adapters:
            now = f"now merged too: {', '.join(names)}" if names else "nothing to do"
            warn(f"Already merged: {', '.join(self.merged_adapters)}; {now}.")
        state = self.backend.state
        chosen = [p for name in names for p in placements(state, name)]
        refuse_no_weight(chosen)
        results = {}
        for group in track(by_target(chosen).values(), "Merging", disable=not progressbar):
            found, _ = folded(self.backend.adapters, group, safe_merge)
            results |= found
        with self.backend.adapters.peft_fx.sharing.writing(results.values()):
            self.replaced.write(results)
        self.merged_adapters += names
        self.refresh()

    def hotswap(self, source, name: str) -> SwapReport:
        """`peft_fx.hotswap`; what is merged is merged anew."""
        merged = self.merged_adapters if name in self.merged_adapters else ()
        if merged:
            self.unmerge_adapter()
        try:
            return self.backend.hotswap(source, name)
        finally:
            if merged:
                self.merge_adapter(list(merged))

    def unmerge_adapter(self) -> None:
        """The model's parameters as they were before the merge, bit for bit."""
        if not self.merged_adapters:
            warn("Already unmerged: nothing to do.")
        self.replaced.undo()
        self.merged_adapters = ()
        self.refresh()

    def unload(self) -> nn.Module:
        """The model, called as before it had adapters. What layer_replication changed in it is undone: layers and config."""
        self.hosts.close()
        shallow(self.model)
        return self.model

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names=None) -> nn.Module:
        """The model with adapters folded in, and nothing else left of them."""
        self.merge_adapter(adapter_names, safe_merge, progressbar)
        if any(self.backend.state.table.tied_to(name) for name in self.replaced.before) and hasattr(
            self.model, "config"
        ):
            warn(
                "The input and output embeddings are not tied any more after this merge: tie_word_embeddings=False is set in the "
                "model's config"
            )
            self.model.config.tie_word_embeddings = False  # or the next from_pretrained would tie them again
        return self.unload()


def refuse_adapted(model: nn.Module, config: AdapterConfig) -> None:
    """Raises ValueError for a PeftModel, a model that adapters were injected into, or one that layer_replication made deeper."""
    around, inside = model._modules.get("base_model"), model.__dict__.get(INJECTED)
    if isinstance(around, Tuner):
        there = around
        remedy = "model.add_adapter(name, config) or load_adapter add one to them, unload() takes them away"
    elif inside is not None:
        there, remedy = inside, "inject_adapter_in_model(config, model, name) adds one to them"
    elif is_deeper(model) or (config.layer_replication and hosts_in(model)):
        raise RecipeError(
            f"there is a PeftModel around this {model._get_name()} already, and layer_replication is for one alone: call its "
            "unload() first"
        )
    else:
        return
    raise ValueError(f"this {model._get_name()} has adapters already ({', '.join(there.peft_config)}): {remedy}")


def tuner_of(model: nn.Module) -> Tuner:
    """The adapters of a PeftModel, or of a model that they were injected into. Raises NoAdaptersError for any other."""
    model = unwrapped(model)
    inside = model._modules.get("base_model")
    tuner = inside if isinstance(inside, Tuner) else model.__dict__.get(INJECTED, model)
    if not isinstance(tuner, Tuner):
        raise no_adapters(model)
    return tuner
