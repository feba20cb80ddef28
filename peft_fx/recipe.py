"""`Recipe`: the serialisable list of what to apply, adapter name -> config, and the forms in which users bring one."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, ItemsView, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .atomic import current
from .config import AdapterConfig
from .config_files import CONFIG_FILE, RUNTIME_ONLY
from .errors import RecipeError, UnknownMethodError, WrongTypeError
from .fields import default_of
from .methods import get_config
from .tables import as_html


@dataclass(frozen=True)
class Recipe:
    """Adapters in the order in which they are applied."""

    adapters: Mapping[str, AdapterConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", MappingProxyType(dict(self.adapters)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, adapter: str) -> AdapterConfig:
        return self.adapters[adapter]

    def items(self) -> ItemsView[str, AdapterConfig]:
        return self.adapters.items()

    def to_dict(self) -> dict:
        return {"adapters": {name: config.to_dict() for name, config in self.adapters.items()}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def _repr_html_(self) -> str:
        return as_html([part for name, c in self.items() for part in (f"adapter {name}", *c.as_parts())])

    @classmethod
    def from_dict(cls, data: dict, adapter_name: str = "default") -> Recipe:
        """Reads {"adapters": {name: config}}, or one config dict, which gets `adapter_name`."""
        if not isinstance(data, dict):
            raise WrongTypeError(f"a recipe is a dict, got {type(data).__name__}")
        if "adapters" not in data:
            return cls({adapter_name: config_from_dict(data)})
        extra = sorted(map(str, data.keys() - {"adapters"}))
        if extra or not isinstance(data["adapters"], dict) or not data["adapters"]:
            wrong = f", unknown keys {extra}" if extra else ""
            raise RecipeError(f'a recipe is {{"adapters": {{name: config}}}} with at least one adapter{wrong}')
        return cls({name: as_config(config) for name, config in data["adapters"].items()})


def as_recipe(obj: Any, adapter_name: str = "default") -> Recipe:
    """A Recipe from whatever a user has.

    obj: a Recipe, an AdapterConfig, a config of PEFT's, a dict (one config, or {"adapters": ...}), a path to a .json,
    .yaml or .yml file, or a folder that holds `adapter_config.json`. Raises RecipeError.
    """
    if isinstance(obj, Recipe):
        return obj
    if isinstance(obj, (str, Path)):
        return recipe_from_path(Path(obj), adapter_name)
    if isinstance(obj, dict):
        return Recipe.from_dict(obj, adapter_name)
    return Recipe({adapter_name: as_config(obj)})


def as_config(obj: Any) -> AdapterConfig:
    """An AdapterConfig of its own from a config of ours, of PEFT's, or a dict. Raises RecipeError."""
    if type(obj) is AdapterConfig and obj.peft_type is not None:
        return config_from_dict(obj.to_dict())
    if isinstance(obj, AdapterConfig):
        return dataclasses.replace(copy.deepcopy(obj))  # it may have been changed, and may be again
    if isinstance(obj, dict):
        return config_from_dict(obj)
    if isinstance(obj, type):
        raise WrongTypeError(f"expected a config, got the class {obj.__name__}: call it, e.g. {obj.__name__}(...)")
    if hasattr(obj, "to_dict") and getattr(obj, "peft_type", None) is not None:
        return config_from_dict({**set_in(obj), "peft_type": obj.peft_type})
    raise WrongTypeError(f"expected a config, a recipe, a dict or a path, got {type(obj).__name__}")


def set_in(config: Any) -> dict:
    """A config of PEFT's as a dict, without fields that we do not know and that nobody set: a newer PEFT has more of them."""
    known = {f.name for f in dataclasses.fields(get_config(config.peft_type))}
    unset = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) == default_of(f)} - known
    return {key: value for key, value in config.to_dict().items() if key not in unset}


def config_from_dict(data: dict, where: str | None = None) -> AdapterConfig:
    """The config that a dict describes. where: as for `AdapterConfig.from_dict`."""
    if data.get("peft_type") is None:
        raise UnknownMethodError(f"a config names its peft_type, e.g. 'LORA'; got the keys {sorted(map(str, data))}")
    plain = {key: plain_value(value) for key, value in data.items() if key not in RUNTIME_ONLY}
    return get_config(plain["peft_type"]).from_dict(plain, where)


def plain_value(value: Any) -> Any:
    """JSON's version of a value: sets and tuples become lists, enum members their values."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain_value, value))
    if isinstance(value, (list, tuple)):
        return [plain_value(v) for v in value]
    if isinstance(value, dict):
        return {plain_value(k): plain_value(v) for k, v in value.items()}
    return value


def recipe_from_path(path: Path, adapter_name: str) -> Recipe:
    file = current(path, CONFIG_FILE) if path.is_dir() else path
    if file.suffix not in READERS:
        raise RecipeError(
            f"{path}: expected one of {', '.join(READERS)}, a folder with {CONFIG_FILE}, or a config, e.g. "
            "{'peft_type': 'LORA'}"
        )
    try:
        data = READERS[file.suffix](file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: not valid {file.suffix[1:]}: {error}") from error
    try:
        if file.name == CONFIG_FILE and isinstance(data, dict):  # what a program wrote; a recipe's keys somebody typed
            return Recipe({adapter_name: config_from_dict(data, str(file))})
        return Recipe.from_dict(data, adapter_name)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from error


def load_yaml(text: str) -> Any:
    import yaml  # only who writes recipes in YAML needs it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


READERS: dict[str, Callable[[str], Any]] = {".json": json.loads, ".yaml": load_yaml, ".yml": load_yaml}
