"""`AdapterConfig`: the hyper-parameters of one adapter, with PEFT's field names, defaults and JSON.

A config is a dataclass, checked when it is made and again when it is used. What a method adds is a subclass with more
fields, in the method's own file. Fields that PEFT has and this version cannot do are declared too, so that files
round-trip; setting them is refused with the reason. How the adapter of a file began is no concern of its reader's: such
values are kept as they are (`Begun`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .atomic import write_files
from .checks import check_names, check_type
from .errors import NotAFolderError, RecipeError, UnknownFieldError, UnsupportedError, WrongTypeError
from .fields import Begun, begun
from .missing import VARIANTS, not_yet
from .notices import warn
from .suggestions import did_you_mean
from .tables import Cell, Table, as_html

CONFIG_FILE = "adapter_config.json"
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# field -> whether one string (a regex, or a single name) may stand for the list
NAME_FIELDS = {
    "target_modules": True, "exclude_modules": True, "layers_pattern": True,
    "target_parameters": False, "modules_to_save": False,
}  # fmt: skip
# what only PEFT's LoRA has among the shared fields
LORA_ONLY = frozenset({"ensure_weight_tying", "layer_replication", "target_parameters", "trainable_token_indices"})


class Rebasable:
    """What a class derives from whose bases may change: Python refuses to change those of a class that has `object` alone."""


@dataclass
class AdapterConfig(Rebasable):
    """Fields that every method shares: which modules are adapted, which are trained whole, and the file's bookkeeping.

    target_modules: list of module names (exact or suffix), one regex that must match the whole name, "all-linear", or
        None for the model type's default. exclude_modules: same syntax, tested first.
    layers_to_transform / layers_pattern: layer indices to keep, and the name of the layer list they count in.
    target_parameters: parameter paths (suffix match) for weights that are no module of their own, e.g. MoE experts.
    modules_to_save: modules that get a trained copy of their own.
    bias: "none", "all" or "<method>_only": which of the model's biases are trained.
    trainable_token_indices: token ids whose embedding rows are trained; a dict names the embedding module.
    layer_replication: [start, end) ranges of layers that make up a deeper model with shared base weights.
    ensure_weight_tying: keep tied weights tied in modules_to_save and embedding targets.
    """

    peft_type: ClassVar[str] = ""
    # field -> why a value other than the default is refused
    refused: ClassVar[dict[str, str]] = {}
    # fields whose keys are patterns of module names
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    # shared fields that PEFT's config of this type lacks: files name them only where they are set
    absent: ClassVar[frozenset[str]] = frozenset()
    # two sizes of which one has to be given, the other being 0
    alternatives: ClassVar[tuple[str, ...]] = ()
    # the field that holds the rank, where an adapter fits into a wider one; a rank_pattern overrides it
    ranked: ClassVar[str] = ""
    # a folder or Hub id -> its config; files/read.py, some layers above, puts it here
    reader: ClassVar[Callable[..., AdapterConfig]]
    is_prompt_learning: ClassVar[bool] = False

    task_type: str | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layer_replication: list[list[int]] | None = None
    ensure_weight_tying: bool = False

    def __new__(cls, *args, **fields):
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields.keys() - known:
            if name in VARIANTS:
                raise UnsupportedError(f"{cls.__name__}: {name}: {not_yet(VARIANTS[name])}")
            hint = did_you_mean(name, known) or f"; its fields: {', '.join(known)}"
            raise UnknownFieldError(f"{cls.__name__} got an unexpected keyword argument {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (set, tuple)):
                setattr(self, f.name, sorted(value) if isinstance(value, set) else list(value))
            reason = self.refused.get(f.name)
            if reason and not isinstance(value, Begun) and value not in (default_of(f), None, False):
                raise UnsupportedError(f"{type(self).__name__}: {f.name}={value!r} is refused: {reason}")
            check_type(f"{type(self).__name__}: {f.name}", value, f.type)
            if f.default_factory is dict:
                check_dict(self, f.name)
            if (check := f.metadata.get("check")) and not (value is None and default_of(f) is None):
                check(f.name, value)
        if self.task_type is not None and self.task_type not in TASKS:
            raise RecipeError(
                f"task_type={self.task_type!r}: expected one of {', '.join(TASKS)}, or None{did_you_mean(self.task_type, TASKS)}"
            )
        for name, string in NAME_FIELDS.items():
            check_names(name, getattr(self, name), string)
        if not isinstance(self.layers_to_transform, (int, list, type(None))) or any(
            isinstance(i, bool) or not isinstance(i, int) for i in indices(self.layers_to_transform)
        ):
            raise WrongTypeError(f"layers_to_transform: expected layer indices, got {self.layers_to_transform!r}")
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise RecipeError(
                        f"{name} cannot be combined with the regex target_modules={self.target_modules!r}: "
                        "put the layer numbers into the regex, or give a list of names"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise RecipeError("layers_pattern is given without layers_to_transform: name the layer indices too")
        if self.bias not in ("none", "all") and not str(self.bias).endswith("_only"):
            raise UnsupportedError(f"bias={self.bias!r}: expected 'none', 'all' or '<method>_only'")

        sizes = [getattr(self, name) for name in self.alternatives]
        if sizes and (min(sizes) < 0 or sizes.count(0) != 1):
            raise RecipeError(f"({', '.join(self.alternatives)})={(*sizes,)}: one has to be positive, the other 0")

    def fallback_targets(self, table) -> list[str] | str | None:
        """What target_modules=None means for a model (its ModuleTable) whose type has no default; None: it must be named."""
        return None

    def missing_base(self) -> str:
        """What to say of a file whose tensors are for other base weights than the model's; "" for any other."""
        return ""

    def with_rank(self, rank: int):
        """The same config with every rank set to `rank`. Raises RecipeError for methods that have no rank."""
        if not self.ranked:
            raise RecipeError(f"{self.peft_type} has no rank to set")
        patterns = {f.name: default_of(f) for f in dataclasses.fields(self) if f.name == "rank_pattern"}
        return dataclasses.replace(self, **{self.ranked: rank}, **patterns)

    def to_dict(self) -> dict[str, Any]:
        """PEFT's on-disk dict, `peft_type` included."""
        unset = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) == default_of(f)}
        written = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.absent or k not in unset}
        return {**written, "peft_type": self.peft_type}

    def to_json(self) -> str:
        """PEFT's `adapter_config.json`: sorted keys, indent 2."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    def _repr_html_(self) -> str:
        return as_html(self.as_parts())

    def as_parts(self) -> list[str | Table]:
        """For a notebook: the fields, those that differ from their defaults first."""
        rows = [(f.name, repr(getattr(self, f.name)), default_of(f)) for f in dataclasses.fields(self)]
        rows = [(name, value, "required" if d is dataclasses.MISSING else repr(d)) for name, value, d in rows]
        changed = [[Cell(text, "bold") for text in row] for row in rows if row[1] != row[2]]
        others = [[Cell(text, "dim") for text in row] for row in rows if row[1] == row[2]]
        return [f"{type(self).__name__}, {self.peft_type}", Table(("field", "value", "default"), changed + others)]

    def save_pretrained(self, save_directory) -> None:
        """Writes `adapter_config.json`, whole or not at all. Raises AdapterFileError."""
        folder, text = Path(save_directory), self.to_json()
        if os.path.isfile(folder):
            raise NotAFolderError(f"{folder} is a file, expected a folder to write {CONFIG_FILE} into")
        write_files(folder, {CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8")})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, **hub):
        """The config in a folder or a Hub repository, of this class or one derived from it.

        hub: revision, token and whatever else huggingface_hub's `snapshot_download` takes. Raises AdapterFileError, and
        RecipeError for another method's config and for fields of a config.
        """
        if fields := sorted(hub.keys() & {f.name for f in dataclasses.fields(cls)} - {"revision"}):
            raise RecipeError(
                f"{', '.join(fields)}: what a file says is changed in the config that is read: config.{fields[0]} = ..."
            )
        config = AdapterConfig.reader(pretrained_model_name_or_path, subfolder, **hub)
        if not isinstance(config, cls):
            raise RecipeError(
                f"{pretrained_model_name_or_path}: expected a {cls.__name__}, got a {type(config).__name__}: read it with "
                "PeftConfig"
            )
        return config

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str | None = None):
        """Reads a config dict. Unknown keys are an error unless they hold an empty value, as newer versions write.

        where: the adapter's file, if `data` is from one: unknown keys are other programs' or newer versions' then, and are
        left out with a warning; how the adapter began may be anything. Raises RecipeError for unknown fields that are set,
        and for values of the wrong type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        others = data.keys() - known.keys() - {"peft_type"}
        unknown = sorted(key for key in others if data[key] not in (None, False, {}, [], "none"))
        if where is not None:
            values = {key: begun(known[key], value) for key, value in values.items()}
            if unknown:
                warn(
                    f"{where}: this version does not know {', '.join(unknown)}, which another program or a newer PEFT wrote: "
                    "read without; if they change what the adapter computes, outputs are others"
                )
        elif unknown:
            name, value = unknown[0], data[unknown[0]]
            hint = did_you_mean(name, known) or f"; known: {sorted(known)}"
            raise UnknownFieldError(f"{cls.peft_type}: unknown config field {name!r} = {value!r}{hint}")
        return cls(**values)


def refuse_to_begin(config: AdapterConfig) -> None:
    """Raises RecipeError for a config of a file whose adapter began in a way that is missing here: a new one cannot."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if found := {name: value.plain(value) for name, value in values.items() if isinstance(value, Begun)}:
        dataclasses.replace(config, **found)


def default_of(f: dataclasses.Field):
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def indices(layers: list | int | None) -> list:
    return layers if isinstance(layers, list) else [] if layers is None else [layers]


def check_dict(config: AdapterConfig, name: str) -> None:
    """None means {}; raises RecipeError for anything that is no dict."""
    value = getattr(config, name)
    if value is not None and not isinstance(value, dict):
        raise WrongTypeError(f"{name}: expected a dict, got {value!r}")
    setattr(config, name, value or {})


def by_pattern(pattern: dict[str, Any] | None, path: str, default):
    """PEFT's rank_pattern / alpha_pattern lookup: first key that, as a regex, ends the path at a component border."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


PeftConfig = AdapterConfig  # PEFT's name
