"""`AdapterConfig`: the hyper-parameters of one adapter, with PEFT's field names, defaults and JSON.

A config is a dataclass, checked when it is made and again when it is used. What a method adds is a subclass with more
fields, in the method's own file. Fields that PEFT has and this version cannot do are declared too, so that files
round-trip; setting them is refused with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .errors import NotAFolderError, RecipeError, UnsupportedError, WrongTypeError

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 65536  # an adapter file that asks for more is damaged or hostile
# field -> whether one string (a regex, or a single name) may stand for the list
NAME_FIELDS = {
    "target_modules": True, "exclude_modules": True, "layers_pattern": True,
    "target_parameters": False, "modules_to_save": False,
}  # fmt: skip
# what only PEFT's LoRA has among the shared fields
LORA_ONLY = frozenset({"ensure_weight_tying", "layer_replication", "target_parameters", "trainable_token_indices"})
# annotation of a field -> what its value must be; other annotations are checked where they are used
PLAIN_TYPES = {"bool": bool, "int": int, "float": (int, float)}


@dataclass
class AdapterConfig:
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

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (set, tuple)):
                setattr(self, f.name, sorted(value) if isinstance(value, set) else list(value))
            reason = self.refused.get(f.name)
            if reason and value not in (default_of(f), None, False):
                raise RecipeError(f"{type(self).__name__}: {f.name}={value!r} is refused: {reason}")
            check_type(f"{type(self).__name__}: {f.name}", value, f.type)
            if f.default_factory is dict:
                check_dict(self, f.name)
            if (check := f.metadata.get("check")) and not (value is None and default_of(f) is None):
                check(f.name, value)
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

    def save_pretrained(self, save_directory) -> None:
        """Writes `adapter_config.json`, whole or not at all."""
        path = Path(save_directory) / CONFIG_FILE
        if path.parent.is_file():
            raise NotAFolderError(f"{path.parent} is a file, expected a folder to write {CONFIG_FILE} into")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            whole = Path(temporary) / CONFIG_FILE
            whole.write_text(self.to_json(), encoding="utf-8")
            os.replace(whole, path)

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
    def from_dict(cls, data: dict[str, Any]):
        """Reads a config dict. Unknown keys are an error unless they hold an empty value, as newer versions write.

        Raises RecipeError for unknown fields that are set, and for values of the wrong type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        values = {}
        for key, value in data.items():
            if key == "peft_type":
                continue
            if key in known:
                values[key] = value
            elif value not in (None, False, {}, [], "none"):
                raise RecipeError(f"{cls.peft_type}: unknown config field {key!r} = {value!r}; known: {sorted(known)}")
        return cls(**values)


def default_of(f: dataclasses.Field):
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def indices(layers: list | int | None) -> list:
    return layers if isinstance(layers, list) else [] if layers is None else [layers]


def check_names(what: str, value, string: bool) -> None:
    """Raises RecipeError unless `value` is None, a list of strings or, where `string`, one string."""
    if value is None or (string and isinstance(value, str)):
        return
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise WrongTypeError(f"{what}: expected a list of names{' or a string' if string else ''}, got {value!r}")


def check_dict(config: AdapterConfig, name: str) -> None:
    """None means {}; raises RecipeError for anything that is no dict."""
    value = getattr(config, name)
    if value is not None and not isinstance(value, dict):
        raise WrongTypeError(f"{name}: expected a dict, got {value!r}")
    setattr(config, name, value or {})


def check_type(what: str, value, annotation: str) -> None:
    """Raises RecipeError unless a field annotated as a plain number or boolean holds one, and a finite one."""
    expected = PLAIN_TYPES.get(getattr(annotation, "__name__", annotation))
    if expected is None:
        return
    boolean = isinstance(value, bool) and expected is not bool
    if boolean or not isinstance(value, expected) or not math.isfinite(value):
        raise WrongTypeError(f"{what}: expected {getattr(annotation, '__name__', annotation)}, got {value!r}")


def check_rank(what: str, value) -> None:
    """Raises RecipeError unless `value` is a usable rank."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_RANK:
        raise RecipeError(f"{what}: expected an integer from 1 to {MAX_RANK}, got {value!r}")


def check_count(what: str, value) -> None:
    """Raises RecipeError unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"{what}: expected a positive integer, got {value!r}; nearest valid: 1")


def number_that(holds: Callable[[Any], bool], expected: str):
    """A check of numbers: raises RecipeError unless `holds` is true of the value."""

    def check(what: str, value) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise RecipeError(f"{what}: expected {expected}, got {value!r}")

    return check


check_positive = number_that(lambda v: v > 0, "a number above 0")

# Fields that check themselves: `r: int = rank(8)`. A default of None allows None.


def rank(default: int | None):
    """An integer from 1 to MAX_RANK."""
    return field(default=default, metadata={"check": check_rank})


def count(default: int):
    """An integer of 1 or more."""
    return field(default=default, metadata={"check": check_count})


def checked(default, holds: Callable[[Any], bool], expected: str):
    """A field whose value must make `holds` true."""
    return field(default=default, metadata={"check": number_that(holds, expected)})


def probability(default: float = 0.0):
    return checked(default, lambda p: 0.0 <= p < 1.0, "0 <= p < 1")


def positive(default: float | None):
    return field(default=default, metadata={"check": check_positive})


def nonnegative(default: float | None):
    return checked(default, lambda v: v >= 0, "0 or more")


def one_of(*choices):
    """A field with one of these values; the first is the default."""

    def check(what: str, value) -> None:
        if not any(value is c or (value == c and type(value) is type(c)) for c in choices):
            raise RecipeError(f"{what}={value!r}: expected one of {choices}")

    return field(default=choices[0], metadata={"check": check})


def by_pattern(pattern: dict[str, Any] | None, path: str, default):
    """PEFT's rank_pattern / alpha_pattern lookup: first key that, as a regex, ends the path at a component border."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def pattern_field(check: Callable[[str, Any], None] | None = None, **default):
    """A name-regex -> value dict field. check: of each value, with what to call it. default: `field`'s, where not {}."""

    def check_values(what: str, values) -> None:
        for key, value in (values or {}).items():
            check(f"{what}[{key!r}]", value)

    return field(**(default or {"default_factory": dict}), metadata={"check": check_values} if check else {})


PeftConfig = AdapterConfig  # PEFT's name
