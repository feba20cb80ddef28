"""Targets and the module table they are chosen from: plain data, no tensors, no graph.

A *target* is a parameter of the model, (module path, parameter name). Recipes choose targets from the *module table*,
which is recorded at capture, travels in `gm.meta["peft_fx"]` and in a `.pt2`'s extra files, and can equally be made from
a module tree that was never captured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class ModuleRecord:
    """One module of the model.

    path: dotted path of its first occurrence. type: class name. bases: class names of its MRO up to `Module`.
    parameters / buffers: name -> shape of what the module owns directly (buffers: persistent ones only).
    attributes: the few literals that change what a weight means (groups, padding_mode, is_transposed, ...).
    aliases: further paths under which the same module object is reachable.
    """

    path: str
    type: str
    bases: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    def is_a(self, *names: str) -> bool:
        """True if the class or one of its bases is called one of `names`."""
        return any(name in self.bases for name in names)


@dataclass(frozen=True)
class Renaming:
    """How checkpoints called modules otherwise than the model does: a regex, and what the first match of it is now.

    scopes: only behind the first of these that a name begins with; ("",): everywhere.
    """

    pattern: str
    to: str
    scopes: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class ModuleTable:
    """All modules of a model, in `named_modules` order, and what selection needs to know about the model.

    tied: groups of parameter names (module path + "." + parameter) that are one tensor.
    output_head / input_embedding: module paths of `get_output_embeddings()` / `get_input_embeddings()`, if any.
    renamings: from names in older checkpoints to those of the records, in order.
    """

    records: tuple[ModuleRecord, ...]
    model_type: str | None = None
    name_or_path: str | None = None
    model_class: str | None = None
    output_head: str | None = None
    input_embedding: str | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    renamings: tuple[Renaming, ...] = ()

    @cached_property
    def by_path(self) -> dict[str, ModuleRecord]:
        """Module path or alias -> record."""
        paths = {record.path: record for record in self.records}
        return {alias: record for record in self.records for alias in record.aliases} | paths

    def __getitem__(self, path: str) -> ModuleRecord:
        return self.by_path[path]

    def __contains__(self, path: str) -> bool:
        return path in self.by_path

    def below(self, path: str) -> list[ModuleRecord]:
        """The module at `path` and every module inside it."""
        return [r for r in self.records if r.path == path or r.path.startswith(path + ".") or not path]

    def tied_to(self, name: str) -> tuple[str, ...]:
        """The other names of the tensor called `name`; () if it is not tied."""
        return next((tuple(n for n in group if n != name) for group in self.tied if name in group), ())

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> ModuleTable:
        records = tuple(
            ModuleRecord(
                **{
                    **r,
                    "bases": tuple(r["bases"]),
                    "aliases": tuple(r["aliases"]),
                    "parameters": {k: tuple(v) for k, v in r["parameters"].items()},
                    "buffers": {k: tuple(v) for k, v in r["buffers"].items()},
                }
            )
            for r in data["records"]
        )
        renamings = tuple(Renaming(**{**r, "scopes": tuple(r["scopes"])}) for r in data.get("renamings", ()))
        return cls(**{**data, "records": records, "tied": tuple(map(tuple, data["tied"])), "renamings": renamings})


@dataclass(frozen=True)
class Target:
    """A parameter to adapt, as methods see it.

    kind: operator kind (linear, conv1d, conv2d, conv3d, embedding, norm, expert), or "parameter": taken as it is.
    shape: canonical shape, (experts?, out, in / groups, *kernel); norms: the parameter's own shape.
    transposed: the stored weight has its last two canonical axes swapped (transformers' Conv1D, embedding tables,
        experts with `is_transposed`).
    bias: name of the bias parameter in the same module, whether or not it exists in the model.
    has_bias: it exists.
    file_path: the path under which PEFT files this target; differs from `path` where PEFT wraps a parent module.
    by_parameter: chosen by `target_parameters`, so that patterns match the parameter's name, not its module's.
    wrapper: the module that was chosen, where it is not `path`: patterns match it (MultiheadAttention's out_proj).
    expert: which expert of a stack of weights, where the target is one of them.
    """

    path: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    transposed: bool = False
    groups: int = 1
    bias: str = "bias"
    has_bias: bool = False
    file_path: str = ""
    by_parameter: bool = False
    wrapper: str = ""
    expert: int | None = None

    @property
    def pattern_path(self) -> str:
        """What rank_pattern and alpha_pattern keys are matched against."""
        return self.name if self.by_parameter else self.wrapper or self.path

    @property
    def name(self) -> str:
        """Fully qualified parameter name, e.g. `model.layers.0.self_attn.q_proj.weight`."""
        return self.tensor_name if self.expert is None else f"{self.tensor_name}[{self.expert}]"

    @property
    def tensor_name(self) -> str:
        """Name of the parameter that holds the weight: a stack's, for one expert of it."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @property
    def bias_name(self) -> str:
        return f"{self.path}.{self.bias}" if self.path else self.bias

    @property
    def reads_ids(self) -> bool:
        """Whether the operator's input is indices, not numbers."""
        return self.kind == "embedding"

    @property
    def experts(self) -> int | None:
        return self.shape[0] if self.kind == "expert" else None

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:] if self.kind.startswith("conv") else ()

    @property
    def out_features(self) -> int:
        return self.shape[1] if self.kind == "expert" else self.shape[0]

    @property
    def in_features(self) -> int:
        """Input features or channels, over all groups."""
        return (self.shape[2] if self.kind == "expert" else self.shape[1]) * self.groups


def sizes(shape: Iterable) -> str:
    """A shape as torch prints it, without its class: `[64, 32]`."""
    return f"[{', '.join(map(str, shape))}]"
