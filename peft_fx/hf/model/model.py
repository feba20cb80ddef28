"""`PeftModel` and its classes by task: a Hugging Face model, or any module, with adapters, under PEFT's names."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from ...atomic import StrPath
from ...config import AdapterConfig
from ...errors import TargetError
from ...files.read import located, read_adapter
from ...notices import warn
from ...peft_types import PeftType, TaskType
from ...planning.modules import module_table, own_class
from ...planning.saved import names_to_save
from ...recipe import as_config
from ..files.embeddings import loaded_embeddings
from ..files.hub import push_to_hub
from ..files.saving import create_or_update_model_card, save_pretrained
from ..hosts.bindings import REMEDY
from ..hosts.locked import lock
from .configs import Configs
from .functional import set_peft_model_state_dict
from .guise import adopted, derived_from, seen, signed, unmade
from .numbers import reported, rewritten
from .status import TunerLayerStatus, TunerModelStatus, layer_status, model_status, parameter_counts
from .tuner import DEFAULT, IN_MODEL, Tuner
from .tuners import tuner_class

COUNTS = ("get_memory_footprint", "num_parameters")  # transformers', which go over the adapters too


class PeftModel(PushToHubMixin, nn.Module):
    """A model with adapters. It is called like the model, and passes on every attribute that it does not have itself.

    model: the model, which is adapted in place: its parameters stay its own, its calls run adapted. peft_config: a config of
    ours, of PEFT's, or a dict. Raises RecipeError, a ValueError, where nothing matches or a target is refused.
    """

    task_type: TaskType | None = None
    one_type = True  # whether its adapters are of one peft_type

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str = DEFAULT,
                 autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False, *, source: tuple | None = None,
                 trainable: bool = True):  # fmt: skip
        super().__init__()
        config = prepared(as_config(peft_config), model)
        kind = tuner_class(cast(str, config.peft_type)) if self.one_type else Tuner
        self.base_model = kind(model, config, adapter_name, source=source, trainable=trainable)
        self.peft_config.adopt(adapter_name, peft_config)
        if not autocast_adapter_dtype:
            self.base_model.cast_to_base(adapter_name)
        if getattr(model, "is_activation_checkpointing", False):
            # reentrant checkpoints pass gradients on to inputs that ask for them alone
            cast(PreTrainedModel, model).enable_input_require_grads()
        self.training = model.training
        self.forward = MethodType(signed(model, type(self).forward), self)  # type: ignore[method-assign]  # of this one
        lock(self.base_model.hosts, self)  # a torch.compile of it calls nothing else

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return unmade, (type(self),), self.__getstate__()  # pickle's own way compares with __class__

    def __getstate__(self) -> dict:
        return {k: v for k, v in super().__getstate__().items() if k != "forward"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        own = signed(self.base_model.model, type(self).forward)
        self.forward = MethodType(own, self)  # type: ignore[method-assign]  # of this one
        lock(self.base_model.hosts, self)

    @property
    def __class__(self) -> type:
        """The model's, to `isinstance`, and PEFT's if that is imported: tools that know these take this for one of them."""
        modules = self.__dict__.get("_modules", {})
        if "base_model" not in modules:
            return type(self)
        peft = sys.modules.get("peft")
        return seen(own_class(modules["base_model"].model), (peft.PeftModel,) if peft is not None else ())

    @__class__.setter
    def __class__(self, new: type) -> None:
        """What torch's `fully_shard` puts together of a class of its own and the one that it sees."""
        object.__dict__["__class__"].__set__(self, derived_from(type(self), new, self.__class__))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, adopted(self, value) if name == "forward" else value)

    def _get_name(self) -> str:
        return type(self).__name__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            found = getattr(self.base_model, name)
            return MethodType(found.__func__, self) if name in COUNTS else found

    # Calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Dynamo takes `self.base_model` for that of `self.__class__`
        return self._modules["base_model"](*args, **kwargs)  # type: ignore[misc]  # it is there

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """The model's. Raises TargetError where an adapter is on the embedding or the head: its tensors have their sizes."""
        table, targets = self.base_model.backend.state.table, self.base_model.targets
        held = [t.path for t in targets if t.path in (table.input_embedding, table.output_head)]
        if held and new_num_tokens is not None:
            raise TargetError(f"resize_token_embeddings: adapters are on {', '.join(dict.fromkeys(held))}: {REMEDY}")
        return cast(PreTrainedModel, self.get_base_model()).resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The model itself, whose calls run adapted."""
        return self.base_model.model

    # Adapters

    @property
    def active_adapter(self) -> str:
        """The one that acts, the first of several."""
        return next(iter(self.base_model.state.active), DEFAULT)

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def peft_config(self) -> Configs:
        """Adapter name -> the config that its caller gave, filled in. Edits are for files, and change no call."""
        return self.base_model.peft_config

    @property
    def active_peft_config(self) -> AdapterConfig:
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self.base_model.enabled and bool(self.active_adapters)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that some adapter trains whole."""
        return {name for c in self.peft_config.values() for name in c.modules_to_save or ()} or None

    @property
    def peft_type(self) -> PeftType:
        """Of the adapter that acts."""
        return PeftType(cast(str, self.active_peft_config.peft_type))

    def add_adapter(self, adapter_name: str, peft_config: Any, low_cpu_mem_usage: bool = False,
                    autocast_adapter_dtype: bool = True) -> None:  # fmt: skip
        """One more adapter, of the type of those there are; it acts once it is set."""
        self.add(adapter_name, as_config(peft_config), autocast=autocast_adapter_dtype)
        self.peft_config.adopt(adapter_name, peft_config)

    def add(self, adapter_name: str, config: AdapterConfig, source: tuple | None = None, trainable: bool = True,
            autocast: bool = True) -> None:  # fmt: skip
        config = prepared(config, self.get_base_model())
        first = next(iter(self.peft_config.values()), config)
        if self.one_type and config.peft_type != first.peft_type:
            raise ValueError(
                f"Cannot combine adapters with different peft types. Found {first.peft_type} and {config.peft_type}: use "
                "get_peft_model(..., mixed=True), or peft_fx.apply, which combine any"
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already: delete it, or give another name")
        self.base_model.add(adapter_name, config, source, trainable)
        if not autocast:
            self.base_model.cast_to_base(adapter_name)

    def load_adapter(self, model_id: StrPath, adapter_name: str, is_trainable: bool = False,
                     torch_device: str | None = None, autocast_adapter_dtype: bool = True,
                     ephemeral_gpu_offload: bool = False, low_cpu_mem_usage: bool = False,
                     key_mapping: dict[str, str] | None = None, ignore_mismatched_sizes: bool = False,
                     **hub: Any) -> _IncompatibleKeys:  # fmt: skip
        """Adds an adapter from PEFT's files, or gives a resident one their numbers. It does not act until `set_adapter`.

        key_mapping: regex -> replacement, for modules that are called otherwise in the files. hub: subfolder, revision, token and
        whatever else huggingface_hub's `snapshot_download` takes. Unless low_cpu_mem_usage, the adapter is initialised
        before it gets the files' numbers: so the generator goes on as PEFT's. torch_device and ephemeral_gpu_offload are not
        read. What fits is taken: keys that are missing, whose tensors start as without files, or left over are named in a
        warning and returned. Raises AdapterFileError for tensors of other shapes, which ignore_mismatched_sizes leaves out
        with a warning, and for files with nothing of this adapter's.
        """
        table = self.base_model.backend.state.table
        config, tensors = read_adapter(located(model_id, **hub), table, key_mapping=key_mapping)
        config.inference_mode = not is_trainable
        with loaded_embeddings(self.get_base_model(), config, tensors, str(model_id)) as own:
            if ignore_mismatched_sizes:
                with ExitStack() as undo:
                    if adapter_name not in self.peft_config:
                        self.add(adapter_name, config, None, is_trainable, autocast_adapter_dtype)
                        undo.callback(self.delete_adapter, adapter_name)
                    result = self.load_fitting(own, adapter_name)
                    undo.pop_all()
            else:
                if adapter_name in self.peft_config:
                    rewritten(self.base_model, adapter_name, config, own, is_trainable)
                else:
                    source = (own, str(model_id), not low_cpu_mem_usage, True)
                    self.add(adapter_name, config, source, is_trainable, autocast_adapter_dtype)
                result = reported(self.base_model, adapter_name, own, str(model_id))
        if not self.base_model.state.gated:
            self.base_model.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return result

    def load_fitting(self, tensors: dict, adapter_name: str) -> _IncompatibleKeys:
        return set_peft_model_state_dict(self, tensors, adapter_name, ignore_mismatched_sizes=True)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """The one adapter that acts from now on, and is trainable unless inference_mode."""
        if not isinstance(adapter_name, str):
            raise TypeError(
                f"adapter_name must be a single string, got {type(adapter_name).__name__}; several adapters at once: "
                "model.base_model.set_adapter([...])"
            )
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model inside the block."""
        with self.base_model.disabled():
            yield

    # What there is

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """A record per adapted module."""
        return layer_status(self.base_model)

    def get_model_status(self) -> TunerModelStatus:
        return model_status(self.base_model, type(self.get_base_model()).__name__, self.base_model._get_name())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all)."""
        return parameter_counts(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # Files

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: StrPath, adapter_name: str = DEFAULT,
                        is_trainable: bool = False, config: Any = None, autocast_adapter_dtype: bool = True,
                        ephemeral_gpu_offload: bool = False, low_cpu_mem_usage: bool = False,
                        key_mapping: dict[str, str] | None = None, ignore_mismatched_sizes: bool = False,
                        **hub: Any) -> PeftModel:  # fmt: skip
        """The model with an adapter from PEFT's files: a folder, or a Hub id. The class follows the file's task_type.

        The arguments are those of `load_adapter`.
        """
        given, folder = config, located(model_id, **hub)
        config, tensors = read_adapter(folder, module_table(model), given and as_config(given), key_mapping)
        chosen = class_of(config) if cls is PeftModel else cls
        config.inference_mode = not is_trainable
        with loaded_embeddings(model, config, tensors, str(model_id)) as own:
            source = None if ignore_mismatched_sizes else (own, str(model_id), not low_cpu_mem_usage, True)
            made = chosen(model, config, adapter_name, autocast_adapter_dtype, trainable=is_trainable, source=source)
            if ignore_mismatched_sizes:
                with ExitStack() as undo:
                    undo.callback(made.unload)
                    made.load_fitting(own, adapter_name)
                    undo.pop_all()
                made.base_model.set_requires_grad(adapter_name, is_trainable)
            else:
                reported(made.base_model, adapter_name, own, str(model_id))
        made.peft_config.adopt(adapter_name, given)
        return made.train(is_trainable and made.training)

    save_pretrained = save_pretrained
    create_or_update_model_card = create_or_update_model_card
    push_to_hub = push_to_hub

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """What a Trainer does not miss when it resumes: the model's own weights."""
        return {k for k in self.state_dict() if not k.startswith(IN_MODEL)}


class PeftModelForCausalLM(PeftModel):
    task_type = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel):
    task_type = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftModel):
    task_type = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModel):
    task_type = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    task_type = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel):
    task_type = TaskType.FEATURE_EXTRACTION


CLASSES = {cls.task_type: cls for cls in PeftModel.__subclasses__()}


class PeftMixedModel(PeftModel):
    """Adapters of any types on one model, several of which act at once, in order. Unlike PEFT's it is saved and merged too."""

    one_type = False

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """These act from now on, in order."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self.base_model.refuse_to_delete(names)
        for name in dict.fromkeys(names):
            self.base_model.delete_adapter(name)


def class_of(config: AdapterConfig) -> type[PeftModel]:
    """The class for a config's task_type."""
    return PeftModel if config.task_type is None else CLASSES[TaskType(config.task_type)]


def get_peft_model(model: nn.Module, peft_config: Any, adapter_name: str = DEFAULT, mixed: bool = False,
                   autocast_adapter_dtype: bool = True, revision: str | None = None,
                   low_cpu_mem_usage: bool = False) -> PeftModel:  # fmt: skip
    """A `PeftModel` of the class for the config's task_type, around `model`, adapted in place. mixed: a PeftMixedModel.

    revision: of the base model, which goes into the config. Raises ValueError for a PeftModel. A model inside of one is
    taken from it, with a warning.
    """
    config = as_config(peft_config)
    if revision is not None:
        if config.revision not in (None, revision):
            warn(f"the config's revision={config.revision!r} gives way to revision={revision!r}")
        config = dataclasses.replace(config, revision=revision)
    name = getattr(model, "name_or_path", None)
    if name and config.base_model_name_or_path not in (None, name):
        warn(
            f"the config's base_model_name_or_path was {config.base_model_name_or_path!r}, now it is the model's, {name!r}: "
            "load that one with this adapter"
        )
        config = dataclasses.replace(config, base_model_name_or_path=name)
    chosen = PeftMixedModel if mixed else class_of(config)
    made = chosen(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    made.peft_config.adopt(adapter_name, peft_config)
    return made


def prepared(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """The config with what follows from the model and the task: the base's name, heads that are trained whole."""
    kept = names_to_save(config, (name for name, _ in model.named_modules()))
    base = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    return dataclasses.replace(config, modules_to_save=kept, base_model_name_or_path=base)
