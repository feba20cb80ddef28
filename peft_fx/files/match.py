"""Does a file fit a plan? Every key, shape and dtype is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import AdapterFileError
from ..planning.kinds import stored_shape
from ..planning.plan import PREFIX, ROOT_KEY, Placement, Plan
from ..suggestions import lookalikes
from ..target import sizes

SHOWN = 5
CANDIDATES = 1000  # looked at for the nearest key; comparing takes time


def match_tensors(
    plan: Plan, tensors: dict[str, torch.Tensor], *, where: str, partial: bool = False
) -> dict[str, torch.Tensor | tuple]:
    """File key -> tensor becomes state name -> tensor, one entry per tensor that some placement owns.

    Of a tensor that files hold in pieces the entry is the tuple of them; whether they fit depends on the base's numbers.

    where: what to call the file in messages. Ignored: the base weights (`<path>.base_layer.weight`) that PEFT writes
    along with adapted embeddings and heads, if they have the base's shape; the second copies of biases that it writes
    inside modules to save, and of shared tensors under each module. Raises AdapterFileError with what is missing, left
    over, or of the wrong shape or dtype. partial: what is missing or left over is no fault, unless nothing fits.
    """
    wanted = {key: (p, name) for p, name, keys in plan.filed for key in keys}
    missing, extra = misfits(plan, tensors)
    if partial and wanted.keys() & tensors.keys():
        missing, extra = [], []
    faults = [
        *listed("missing", missing, extra),
        *listed("not expected", extra, missing or wanted),
        *(f for key, (p, name) in wanted.items() if key in tensors for f in faults_of(key, tensors[key], p, name)),
    ]
    found = {}
    if not faults:
        for p, name, keys in plan.filed:
            if name not in p.shared and all(key in tensors for key in keys):
                values = tuple(tensors[key] for key in keys)
                found[p.state_name(name)] = values if p.tensors[name].pieces else values[0]
        faults = untied(wanted, tensors, found)
    if faults:
        more = [f"... and {len(faults) - 2 * SHOWN} more"] if len(faults) > 2 * SHOWN else []
        lines = [f"{where} does not fit this model and config:", *faults[: 2 * SHOWN], *more]
        raise AdapterFileError("\n  ".join(lines))
    return found


def misfits(plan: Plan, tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """The keys that a plan's adapter has and a file has not; those that only the file has, and some use could have."""
    wanted = {key: name in p.shared for p, name, keys in plan.filed for key in keys}
    missing = [key for key, shared in wanted.items() if key not in tensors and not shared]
    extra = [key for key in tensors if key not in wanted]
    ignored = needless(tensors, plan) if extra else set()
    return missing, [key for key in extra if key not in ignored]


def listed(what: str, keys: list[str], candidates: Iterable[str]) -> list[str]:
    """A line per key, the first few, with the nearest candidate."""
    lines, candidates = [], list(candidates)[:CANDIDATES]
    for key in keys[:SHOWN]:
        near = lookalikes(key, candidates, 1, 0.6)
        lines.append(f"{what}: {key}" + (f" (nearest: {near[0]})" if near else ""))
    return lines + ([f"{what}: {len(keys) - SHOWN} more keys"] if len(keys) > SHOWN else [])


def faults_of(key: str, tensor: torch.Tensor, placement: Placement, name: str) -> list[str]:
    spec, faults = placement.tensors[name], []
    if spec.pieces is None and tensor.shape != tuple(spec.shape):
        faults.append(f"{key}: expected shape {sizes(spec.shape)}, got {sizes(tensor.shape)}")
    if spec.pieces is None and spec.trainable and not tensor.is_floating_point():
        faults.append(f"{key}: expected floating-point numbers, got {tensor.dtype}")
    if spec.below is not None and not faults:
        outside = (tensor < 0) | (tensor >= torch.tensor(spec.below))
        if tensor.is_floating_point() or outside.any():
            found = tensor[outside][0].item() if outside.any() else tensor.dtype
            faults.append(f"{key}: expected integers from 0 to less than {spec.below}, got {found}")
    return faults


def needless(tensors: dict[str, torch.Tensor], plan: Plan) -> set[str]:
    """The keys of what PEFT writes but nothing needs."""
    targets = [p.target for p in plan.placements]
    base = {f"{PREFIX}{t.file_path}.base_layer.{t.parameter}": stored_shape(t) for t in targets}
    found = {key for key, shape in base.items() if key in tensors and tuple(tensors[key].shape) == shape}
    # shared tensors, which PEFT may write under every module besides
    tensors_of = [t for p in plan.placements for t in p.tensors.values()]
    shared = {t.key: tuple(t.shape) for t in tensors_of if t.key is not None and t.key.startswith(ROOT_KEY)}
    copies = {f"{PREFIX}{t.file_path}.{key[len(ROOT_KEY) :]}": s for t in targets for key, s in shared.items()}
    found |= {key for key, shape in copies.items() if key in tensors and tuple(tensors[key].shape) == shape}
    # bias="all" lists the biases of PEFT's wrapper around a saved module, besides the saved ones
    if any(p.method == "SAVED" and p.config.bias == "all" for p in plan.placements):
        inner = (".original_module.", ".modules_to_save.")
        found |= {key for key in tensors if key.endswith(".bias") and any(part in key for part in inner)}
    return found


def untied(wanted: dict, tensors: dict[str, torch.Tensor], found: dict[str, Any]) -> list[str]:
    """Shared tensors that come twice must agree."""
    faults = []
    for key, (placement, name) in wanted.items():
        if name in placement.shared and key in tensors and placement.shared[name].name in found:
            shared = placement.shared[name]
            owner = found[shared.name].mT if shared.transposed else found[shared.name]
            if not torch.equal(owner, tensors[key]):
                faults.append(f"{key}: is tied to {shared.name}, but the file holds other numbers for it")
    return faults
