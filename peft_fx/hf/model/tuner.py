"""`Tuner`: a model and its adapters; what PEFT calls `base_model`.

The model stays the object that it was: its adapted modules run graphs of their own (`hosts.py`), whoever calls them. Merging
writes into its parameters, and keeps what was there, so that unmerging changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.progress import track
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from ...config import AdapterConfig
from ...engine.derive import derived, frozen
from ...engine.inplace import merge_in_place, unmerge_in_place
from ...engine.replaced import shelved
from ...engine.swaps import SwapReport
from ...engine.trainable import untrainable
from ...engine.transitions import activated, enabled, names_of, unmerged
from ...errors import AdapterFileError, MergeError, RecipeError, WrongTypeError
from ...notices import warn
from ...recipe import as_config
from ...storage.twins import open_up
from ...store.state import State, state_of
from ...store.tensors import ADAPTERS, kept_of, store_of, tensor_of
from ...target import Target
from ...training.allocators import Allocator, allocators, penalty, work_of
from ...verbs.backend import Backend
from ...verbs.capture.model import capture
from ...verbs.combine import weighted
from ...verbs.tensors import INJECTED, holder_of
from ..hosts.dropout import InputDropout, dropouts
from ..hosts.hosts import BASE, Hosts, hosts_in, take_over
from ..hosts.replication import deeper, is_deeper, shallow
from ..layers.dress import CHILD, dress, undress_all, undressed
from .configs import Configs
from .printed import printed
from .slots import fill_slot, free_slot, in_slots, write_gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT = "default"
PREFIX = f"{CHILD}."  # in the names of the adapters' parameters, whatever the model is inside of
IN_MODEL = f"base_model.model.{PREFIX}"  # where the state dict of a PeftModel has them
FORMER = "adapters."  # where that of a Tuner had them


class Tuner(nn.Module):
    """A model, adapted in place, and its adapters.

    peft_config: a config of ours, of PEFT's, a dict, or a dict of these by adapter name. source: (tensors, where from, whether
    initial values are drawn first) of a file. Raises RecipeError, a ValueError, where nothing matches or a target is refused.
    """

    peft_type: str | None = None  # of its adapters; None: any
    prefix = PREFIX
    backend: Backend
    hosts: Hosts
    work: dict[str, Allocator]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str = DEFAULT, low_cpu_mem_usage: bool = False, *,
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
        self.dropouts = nn.ModuleList()
        self.forget_importance()
        self.__dict__["hosts"] = Hosts(model, backend, self.refresh)
        self.refresh()

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "work": {}}

    @property
    def state(self) -> State:
        return self.backend.state

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One transition at a time; refused inside a call of the model, which has taken its snapshot."""
        with self.hosts.sharing.swapping():
            yield

    def become(self, state: State) -> None:
        """Calls that begin from now on see this state."""
        with self.hosts.sharing.publishing():
            self.backend.become(state)
            self.settle()
        self.present()

    def settle(self) -> None:
        """What calls take of the state that the engine has now: their snapshot, and gates."""
        state = self.state
        self.hosts.publish(state)
        if state.gated:
            write_gates(self)

    def present(self) -> None:
        """What others look at, after the state has changed."""
        dress(self)
        self.penalised = any(work.penalty for work in work_of(self.backend.adapters).values())

    def refresh(self, changed: Iterable[str] = ()) -> None:
        """After adapters came or went: their tensors are parameters of the model. changed: adapters whose graphs are others."""
        self.configs.synced(self.state)
        self.dropouts = nn.ModuleList(dropouts(self, cast(Iterable[InputDropout], self.dropouts)))
        self.model._modules[CHILD] = self.adapters
        self.hosts.refresh(self.state, tuple(changed))
        self.settle()
        self.present()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """State dicts of earlier versions had the adapters beside the model, under their parameters' own names."""
        for p in self.state.placed(self.state.recipe):
            for tensor in p.tensors:
                former = f"{prefix}{FORMER}{p.adapter}.{p.target.name}.{tensor}"
                if former in state_dict:
                    state_dict[f"{prefix}model.{PREFIX}{p.state_name(tensor)}"] = state_dict.pop(former)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def adapters(self) -> nn.Module:
        """Their tensors, the model's submodule `peft_adapters`: whoever moves, casts or optimises the model has them too."""
        return self.backend.adapters.peft_fx.adapters

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return self.with_penalty(self.model(*args, **kwargs))
        with self.by_rows(adapter_names, (args, kwargs)):
            return self.model(*args, **kwargs)

    def with_penalty(self, outputs: Any) -> Any:
        """The model's outputs, their loss with what the methods of the active adapters add to it."""
        if self.penalised and getattr(outputs, "loss", None) is not None:
            outputs.loss = outputs.loss + penalty(self.backend.adapters)
        return outputs

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """One call: whatever is set or swapped meanwhile counts for the next."""
        generate = cast(Callable, self.model.generate)
        if adapter_names is None:
            return self.hosts.called(generate, args, kwargs)
        with self.by_rows(adapter_names, (args, kwargs)):
            return generate(*args, **kwargs)

    @contextmanager
    def by_rows(self, names: list[str], inputs: tuple) -> Iterator[None]:
        """Inside the block each row of a batch goes through the adapter named for it, "__base__" for none.

        Raises ValueError in training, for merged adapters, unknown names, and another number of names than rows.
        """
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call eval() first")
        state = self.state
        if state.merged:
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
        with self.hosts.by_rows(names, state) if state.enabled else nullcontext():
            yield

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def __repr__(self) -> str:
        """The model, and a line per adapter."""
        return printed(self)

    # Which adapters there are and act

    @property
    def peft_config(self) -> Configs:
        """Adapter name -> the config that its caller gave, filled in. Edits are for files, and change no call."""
        return self.configs.synced(self.backend.state)

    @property
    def names(self) -> list[str]:
        """Those of the adapters, without those that somebody took out of `peft_config`."""
        there = self.peft_config
        return [name for name in self.state.recipe if name in there]

    @property
    def active_adapters(self) -> list[str]:
        return list(self.state.active)

    @property
    def enabled(self) -> bool:
        return self.state.enabled

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        return self.state.merged

    active_adapter = active_adapters  # PEFT's tuners have both

    @property
    def targets(self) -> list[Target]:
        """What some adapter is on."""
        return [p.target for p in self.state.placed(self.names)]

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
        with self.changing():
            if self.state.merged:
                self.unmerge_adapter()
            self.become(enabled(self.state, False))

    def enable_adapter_layers(self) -> None:
        with self.changing():
            self.become(enabled(self.state, True))

    def add(self, name: str, config: AdapterConfig, source: tuple | None = None, trainable: bool = True) -> None:
        """source: what `Source` takes, None for initial values. It does not act until `set_adapter`."""
        with self.changing():
            self.unmerge_first("added")  # it may start from the base's weights
            if name in self.state.recipe and name not in self.peft_config:
                self.backend.delete(name)  # nobody can name it any more
                self.configs.synced(self.state)
            if self.state.gated:
                fill_slot(self, name, config, source)
            else:
                self.backend.add(name, config, source, trainable)
            self.refresh()
            if source is None and name not in self.state.active and not self.state.gated:
                self.set_requires_grad(name, False)

    def reserve(self, *, slots: int, max_rank: int | None = None) -> None:
        """Room for `slots` adapters of the first one's method and targets: the ones that there are, and free slots.

        From now on every call runs all of them, each behind a gate. So whatever is set, disabled, merged, loaded into a free slot
        or deleted, compiled calls of the model stay as they are: 0 recompiles. max_rank: every slot holds ranks up to it. The
        adapters have new parameters: make the optimiser after this. All slots require grad if an adapter does, whatever is set;
        what does not act gets zeros. Raises GraphError as `peft_fx.reserve` does.
        """
        with self.changing():
            in_slots(self, slots, max_rank)
            self.refresh()

    def cast_to_base(self, name: str) -> None:
        """An adapter's tensors in the dtype of the weights that they are for, but for scalars, which no product meets."""
        for p in self.state.recipe[name].placements:
            dtype = kept_of(self.backend.adapters, p.target.tensor_name).dtype
            for key, spec in p.tensors.items():
                tensor = tensor_of(self.backend.adapters, f"{ADAPTERS}.{p.resolve(key).name}")
                numbers = tensor.is_floating_point() and dtype.is_floating_point and spec.dtype is None
                if numbers and (spec.trainable or tensor.dim()):
                    tensor.data = tensor.data.to(dtype)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str,
                             combination_type: str | None = None, *options: Any, **named: Any) -> None:  # fmt: skip
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
        with self.changing():
            self.known(names)
            activated(unmerged(self.state) if self.state.merged else self.state, names)  # may refuse
            self.unmerge_first("set")
            self.become(activated(self.state, names))
            if not self.state.gated:  # a compiled call of a model with slots knows what requires grad
                for name in self.names:
                    self.set_requires_grad(name, name in names and not inference_mode and self.can_train(name))

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Raises AdapterFileError, a RuntimeError, for numbers that cannot be trained on."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.known(names)
        for name in names if requires_grad else ():
            if why := untrainable(self.backend.adapters, name):
                raise AdapterFileError(
                    f"adapter {name!r} {why}: use it for inference alone, or train the whole adapter"
                )
        for name in names:
            tree = self.adapters._modules.get(name)
            others = [p for p in tree.parameters() if p.requires_grad != requires_grad] if tree is not None else []
            if others:
                with self.hosts.sharing.writing(others):  # a call that runs has begun with what it found
                    for parameter in others:
                        parameter.requires_grad_(requires_grad)

    def can_train(self, name: str) -> bool:
        """Whether an adapter that acts is trainable too; warns if it cannot be."""
        if why := untrainable(self.backend.adapters, name):
            warn(f"adapter {name!r} {why}: it acts, and is not trained")
        return not why

    def delete_adapter(self, adapter_name: str) -> None:
        with self.changing():
            self.refuse_to_delete((adapter_name,))
            if self.state.gated:
                free_slot(self, adapter_name)
            else:
                self.backend.delete(adapter_name)
            self.work.pop(adapter_name, None)
            if not self.state.active and (left := [name for name in self.names if name != adapter_name]):
                new = min(left)  # PEFT's choice
                self.backend.become(activated(self.state, new))
                if not self.state.gated:
                    self.set_requires_grad(new, self.can_train(new))
                warn(f"Adapter {adapter_name} was active and is deleted; now {new} is.")
            self.refresh()

    def refuse_to_delete(self, names: Iterable[str]) -> None:
        """Raises AdapterNameError, a ValueError, for an unknown adapter, MergeError, another one, for a merged one."""
        self.known(names)
        if merged := [name for name in names if name in self.merged_adapters]:
            raise MergeError(f"adapter {', '.join(merged)} is merged: call unmerge_adapter() before deleting it")

    def known(self, names: Iterable[str]) -> None:
        """Raises AdapterNameError, a ValueError, for a name that no adapter has."""
        there = {name: self.state.recipe[name] for name in self.names}
        names_of(self.state.update(recipe=there), dict.fromkeys(names))

    def unmerge_first(self, done: str) -> None:
        if self.merged_adapters:
            text = f"Adapter cannot be {done} when the model is merged. Unmerging the model first."
            warn(text)
            self.unmerge_adapter()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the block, merged weights taken out too; afterwards what was before, in nested blocks too."""
        before = self.state
        self.disable_adapter_layers()
        try:
            yield
        finally:
            with self.changing():
                self.become(enabled(self.state, before.enabled))
                if before.merged:
                    self.merge_adapter(list(before.merged))

    def to_graph(self, args: tuple = (), kwargs: dict | None = None, **options: Any) -> fx.GraphModule:
        """A captured graph of the model with these adapters, for the verbs: compile, merge, export, package, reserve, ...

        The arguments are those of `peft_fx.capture`. Graph and model share tensors and the lock: what is swapped or trained
        in one is so in the other.
        """
        # other threads' calls wait, since the model is called without hosts meanwhile
        with self.changing(), self.hosts.sharing.writing(()), self.disabled(), self.hosts.away(), undressed(self):
            captured = capture(self.model, args, kwargs, **options)
        ours = self.backend.adapters.peft_fx
        gm = frozen(captured)
        store = store_of(gm)
        store.adapters, store.sharing, store.gates = ours.adapters, ours.sharing, ours.gates
        state, acting = self.state, self.state.acting
        if state.gated:  # all are in the graph, those that act with their gates open
            acting = (*acting, *(place for place in state.recipe if place not in acting))
        return derived(gm, state_of(gm).update(recipe=state.recipe, active=acting, gated=state.gated))

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
        with self.changing():
            state = self.state
            names = names_of(state, adapter_names or state.active)
            names = tuple(n for n in names if n not in state.merged)
            if state.merged:
                now = f"now merged too: {', '.join(names)}" if names else "nothing to do"
                warn(f"Already merged: {', '.join(state.merged)}; {now}.")
            if names:
                shown = partial(track, description="Merging", disable=not progressbar)
                report = merge_in_place(self.backend.adapters, names, safe_merge, shown, self.settle)
                warn_of_losses(report)
                self.present()

    def hotswap(self, source: Any, name: str) -> SwapReport:
        """`peft_fx.hotswap`; what is merged is merged anew, in one step."""
        with self.changing():
            report = self.backend.hotswap(source, name)
            tree = self.adapters._modules.get(name)
            trained = tree is not None and any(p.requires_grad for p in tree.parameters())
            if trained and not self.can_train(name):
                self.set_requires_grad(name, False)
            if name in self.state.merged:
                self.refresh()
            return report

    def unmerge_adapter(self) -> None:
        """The model's parameters as they were before the merge, bit for bit."""
        with self.changing():
            if not self.state.merged:
                warn("Already unmerged: nothing to do.")
                return
            unmerge_in_place(self.backend.adapters, self.settle)
            self.present()

    def unload(self) -> nn.Module:
        """The model, called as before it had adapters. What layer_replication changed in it is undone: layers and config."""
        self.hosts.close()
        undress_all(self.model)
        self.model._modules.pop(CHILD, None)
        shallow(self.model)
        return self.model

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        storage: str = "requantize",
    ) -> nn.Module:
        """The model with adapters folded in, and nothing else left of them.

        storage: what becomes of packed weights. "requantize": packed again, as in PEFT; "dense": their layers become torch's own.
        """
        if storage not in ("requantize", "dense"):
            raise MergeError(
                f"storage={storage!r}: expected 'requantize' or 'dense'; peft_fx.merge of to_graph() calibrates"
            )
        if storage == "dense":
            with self.changing():
                open_up(self.model, {p.target.path for p in self.state.placed(self.state.recipe)})
                self.backend.keep(self.backend.adapters)
                self.refresh()
        self.merge_adapter(adapter_names, safe_merge, progressbar)
        replaced = shelved(self.backend.adapters)
        if any(self.state.table.tied_to(name) for name in replaced) and hasattr(self.model, "config"):
            warn(
                "The input and output embeddings are not tied any more after this merge: tie_word_embeddings=False is set in the "
                "model's config"
            )
            # or the next from_pretrained would tie them again
            cast("PreTrainedModel", self.model).config.tie_word_embeddings = False
        return self.unload()


def warn_of_losses(report: list[dict]) -> None:
    """Warns of what packing merged weights again has lost."""
    lost = {line["lost"]: line["target"] for line in report if line.get("change")}
    if lost:
        worst = max(lost)
        warn(
            f"merged into packed weights, which rounds anew: it loses {median(lost):.2f} of what the adapters change (median of "
            f"{len(lost)}; {worst:.2f} at {lost[worst]}); merge_and_unload(storage='dense') loses nothing"
        )


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
    return holder_of(model)
