"""`AdapterConfig`: the hyper-parameters of one adapter, with PEFT's field names, defaults and JSON.

A config is a dataclass, checked when it is made and again when it is used. What a method adds is a subclass with more
fields, in the method's own file. Fields that PEFT has and this version cannot do are declared too, so that files
round-trip; setting them is refused with the reason. How the adapter of a file began is no concern of its reader's: such
values are kept as they are (`Begun`).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .checks import check_names, check_type
from .config_files import ConfigFiles
from .errors import RecipeError, UnknownFieldError, UnsupportedError, WrongTypeError
from .fields import Begun, default_of
from .missing import VARIANTS, not_yet
from .names import Names
from .peft_types import PeftType, TaskType, known_type
from .suggestions import did_you_mean
from .tables import Cell, Table, as_html

if TYPE_CHECKING:
    from .target import ModuleTable

# field -> whether one string (a regex, or a single name) may stand for the list
NAME_FIELDS = {
    "target_modules": True, "exclude_modules": True, "layers_pattern": True,
    "target_parameters": False, "modules_to_save": False,
}  # fmt: skip
# what only PEFT's LoRA has among the shared fields
LORA_ONLY = frozenset({"ensure_weight_tying", "layer_replication", "target_parameters", "trainable_token_indices"})


@dataclass
class AdapterConfig(ConfigFiles):
    """Fields that every method shares: which modules are adapted, which are trained whole, and the file's bookkeeping.

    target_modules: module names (exact or suffix), kept as a set as in PEFT's configs, one regex that must match the whole
        name, "all-linear", or None for the model type's default. exclude_modules: same syntax, tested first.
    layers_to_transform / layers_pattern: layer indices to keep, and the name of the layer list they count in.
    target_parameters: parameter paths (suffix match) for weights that are no module of their own, e.g. MoE experts.
    modules_to_save: modules that get a trained copy of their own.
    bias: "none", "all" or "<method>_only": which of the model's biases are trained.
    trainable_token_indices: token ids whose embedding rows are trained; a dict names the embedding module.
    layer_replication: [start, end) ranges of layers that make up a deeper model with shared base weights.
    ensure_weight_tying: keep tied weights tied in modules_to_save and embedding targets.
    """

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
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = field(default=None, repr=False)  # of a method's class always its own
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layer_replication: list[list[int]] | None = None
    ensure_weight_tying: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if (own := vars(cls).get("peft_type")) is not None:
            cls.peft_type = known_type(own)

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields.keys() - known:
            if name in VARIANTS:
                raise UnsupportedError(f"{cls.__name__}: {name}: {not_yet(VARIANTS[name])}")
            hint = did_you_mean(name, known) or f"; its fields: {', '.join(known)}"
            raise UnknownFieldError(f"{cls.__name__} got an unexpected keyword argument {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
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
        self.task_type = member_of(TaskType, "task_type", self.task_type)
        self.peft_type = type(self).peft_type or member_of(PeftType, "peft_type", self.peft_type)
        for name, string in NAME_FIELDS.items():
            check_names(name, getattr(self, name), string)
        if isinstance(self.target_modules, list):
            self.target_modules = Names(self.target_modules)
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

    def fallback_targets(self, table: ModuleTable) -> list[str] | str | None:
        """What target_modules=None means for a model (its ModuleTable) whose type has no default; None: it must be named."""
        return None

    def part_only(self) -> str:
        """Why an adapter cannot be trained on once it was read from a file; "" for one that can."""
        return ""

    def missing_base(self) -> str:
        """What to say of a file whose tensors are for other base weights than the model's; "" for any other."""
        return ""

    def with_rank(self, rank: int) -> Self:
        """The same config with every rank set to `rank`. Raises RecipeError for methods that have no rank."""
        if not self.ranked:
            raise RecipeError(f"{self.peft_type} has no rank to set")
        changes: dict[str, Any] = {f.name: default_of(f) for f in dataclasses.fields(self) if f.name == "rank_pattern"}
        return dataclasses.replace(self, **{**changes, self.ranked: rank})

    def _repr_html_(self) -> str:
        return as_html(self.as_parts())

    def as_parts(self) -> list[str | Table]:
        """For a notebook: the fields, those that differ from their defaults first."""
        rows = [(f.name, repr(getattr(self, f.name)), default_of(f)) for f in dataclasses.fields(self) if f.repr]
        rows = [(name, value, "required" if d is dataclasses.MISSING else repr(d)) for name, value, d in rows]
        changed = [[Cell(text, "bold") for text in row] for row in rows if row[1] != row[2]]
        others = [[Cell(text, "dim") for text in row] for row in rows if row[1] == row[2]]
        return [f"{type(self).__name__}, {self.peft_type}", Table(("field", "value", "default"), changed + others)]


def refuse_to_begin(config: AdapterConfig) -> None:
    """Raises RecipeError for a config of a file whose adapter began in a way that is missing here: a new one cannot."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    found: dict[str, Any]
    if found := {name: value.unmarked() for name, value in values.items() if isinstance(value, Begun)}:
        dataclasses.replace(config, **found)


def member_of(kind: type[TaskType] | type[PeftType], name: str, value: Any) -> TaskType | PeftType | None:
    """The member of an enumeration that a field's value stands for. Raises RecipeError for any other value than None."""
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError:
        hint = did_you_mean(value, [member.value for member in kind])
        raise RecipeError(f"{name}={value!r}: expected one of {', '.join(kind)}, or None{hint}") from None


def indices(layers: list | int | None) -> list:
    return layers if isinstance(layers, list) else [] if layers is None else [layers]


def check_dict(config: AdapterConfig, name: str) -> None:
    """None means {}; raises RecipeError for anything that is no dict."""
    value = getattr(config, name)
    if value is not None and not isinstance(value, dict):
        raise WrongTypeError(f"{name}: expected a dict, got {value!r}")
    setattr(config, name, value or {})


def by_pattern(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rank_pattern / alpha_pattern lookup: first key that, as a regex, ends the path at a component border."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


PeftConfig = AdapterConfig  # PEFT's name
