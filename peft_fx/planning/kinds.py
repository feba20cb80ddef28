"""From a module's record to its targets: how each class keeps its weights.

The table is looked up through the class's bases, so that subclasses count. Parameters of classes that are not in it are
readable if capture saw which operator uses them (`attributes["kinds"]`: parameter -> [kind, transposed, groups]).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..folding import components, gathered, joined
from ..target import ModuleRecord, Target, sizes


@dataclass(frozen=True)
class Reading:
    """How a class keeps its weight. transposed: the last two canonical axes are swapped in storage."""

    kind: str
    transposed: bool = False


# class name -> how to read `weight`
READINGS = {
    "Conv1D": Reading("linear", transposed=True),  # transformers' linear layer, stored (in, out)
    "Linear": Reading("linear"),
    "Conv1d": Reading("conv1d"),
    "Conv2d": Reading("conv2d"),
    "Conv3d": Reading("conv3d"),
    "Embedding": Reading("embedding", transposed=True),  # stored (vocabulary, features)
}
# Normalisations share no base class; their class names end in one of these.
NORMS = ("Norm", "Norm1d", "Norm2d", "Norm3d")
CONTAINERS = ("ModuleList", "ModuleDict", "ParameterList", "ParameterDict")
SUPPORTED = f"supported: {', '.join(READINGS)}, MultiheadAttention, norms, and any parameter by target_parameters"


@dataclass(frozen=True)
class Refusal:
    """A target that cannot be adapted, and why."""

    target_name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.target_name}: {self.reason}"


def one_line_each(refusals: Iterable[Refusal]) -> list[str]:
    """Targets of equal layers that are refused for one reason in one line."""
    found = gathered(((r.reason,), components(r.target_name), r) for r in refusals)
    return [f"{joined(path)}: {members[0].reason}" for path, members in found]


def module_targets(record: ModuleRecord) -> tuple[Target, ...] | Refusal:
    """The targets that a module chosen by `target_modules` stands for: one, two for MultiheadAttention."""
    if record.is_a("MultiheadAttention"):
        return _attention_targets(record)
    reading = next((READINGS[name] for name in record.bases if name in READINGS), None)
    if reading is None and record.type.endswith(NORMS):
        reading = Reading("norm")
    if reading is None:
        return _observed_targets(record)
    if "weight" not in record.parameters:
        return Refusal(record.path, f"{record.type} has no parameter called weight")
    return (_target(record, "weight", reading.kind, reading.transposed, record.attributes.get("groups", 1)),)


def parameter_target(record: ModuleRecord, name: str) -> Target | Refusal:
    """The target for a parameter chosen by `target_parameters`.

    As in PEFT's files, 3-D parameters are (experts, out, in) unless the module says `is_transposed`, and 2-D ones are
    (out, in) whatever the class.
    """
    full_name, shape = _join(record.path, name), record.parameters[name]
    if not record.path:
        return Refusal(full_name, "a parameter of the model's top level has no place in PEFT's file format")
    if len(shape) not in (2, 3):
        return Refusal(full_name, f"target_parameters takes 2-D and 3-D parameters, this one has shape {sizes(shape)}")
    if len(shape) == 2:
        return _target(record, name, "linear", False, 1, by_parameter=True)
    return _target(record, name, "expert", bool(record.attributes.get("is_transposed")), 1, by_parameter=True)


def whole_parameter(path: str, name: str, shape: tuple[int, ...]) -> Target:
    """A parameter or buffer taken as it is stored, for the adapter's own copy of it."""
    return Target(path=path, parameter=name, kind="parameter", shape=shape, bias="", file_path=path)


def stored_shape(target: Target) -> tuple[int, ...]:
    """The shape of the parameter itself, the inverse of the canonical layout."""
    return _swap(target.shape) if target.transposed else target.shape


def _attention_targets(record: ModuleRecord) -> tuple[Target, ...] | Refusal:
    if "in_proj_weight" not in record.parameters:
        return Refusal(
            record.path,
            "MultiheadAttention with kdim or vdim keeps separate q, k and v weights; name them in target_parameters",
        )
    (width, embed), path = record.parameters["in_proj_weight"], record.path
    projection = Target(
        path, "in_proj_weight", "linear", (width, embed),
        bias="in_proj_bias", has_bias="in_proj_bias" in record.parameters, file_path=path,
    )  # fmt: skip
    out = Target(
        _join(path, "out_proj"), "weight", "linear", (embed, embed),
        # torch gives out_proj a bias exactly when it has an in_proj_bias
        has_bias="in_proj_bias" in record.parameters, file_path=_join(path, "base_layer.out_proj"), wrapper=path,
    )  # fmt: skip
    return projection, out


def _observed_targets(record: ModuleRecord) -> tuple[Target, ...] | Refusal:
    """Targets of an unknown class, from what capture saw; PEFT's key has room for one parameter per module."""
    kinds = {n: k for n, k in record.attributes.get("kinds", {}).items() if n in record.parameters}
    names = ["weight"] if "weight" in kinds else list(kinds)
    if len(names) != 1:
        several = f" It uses several parameters ({', '.join(names)}): name them in target_parameters." if names else ""
        return Refusal(record.path, f"{record.type} is no class whose weights are known.{several} {SUPPORTED}")
    kind, transposed, groups = kinds[names[0]]
    return (_target(record, names[0], kind, bool(transposed), groups),)


def _target(
    record: ModuleRecord, name: str, kind: str, transposed: bool, groups: int, by_parameter: bool = False
) -> Target:
    shape = record.parameters[name]
    if transposed:
        shape = _swap(shape)
    return Target(
        path=record.path, parameter=name, kind=kind, shape=tuple(shape), transposed=transposed, groups=groups,
        has_bias="bias" in record.parameters, file_path=record.path, by_parameter=by_parameter,
    )  # fmt: skip


def _swap(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
