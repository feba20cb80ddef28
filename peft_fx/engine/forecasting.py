"""What merging into packed weights is going to lose, before anything is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from ..errors import MergeError
from ..planning.plan import Placement
from ..storage.packed import Packed
from ..storage.schemes import scheme
from ..store.tensors import packed_of
from .merging import folded
from .storing import STORAGES


@dataclass(frozen=True)
class Forecast:
    """One packed weight that a merge changes. scheme: its title. change: of the weight, as a share of it.

    requantize, calibrated: what each of these loses of the change; _outputs: on the products with given activations. None: not
    known without activations, or for a `reason`, its scheme's. packed, dense: bytes.
    """

    target: str
    scheme: str
    shape: tuple[int, ...]
    change: float
    packed: int
    dense: int
    requantize: float | None = None
    calibrated: float | None = None
    requantize_outputs: float | None = None
    calibrated_outputs: float | None = None
    reason: str = ""


def forecast(
    gm: fx.GraphModule, group: list[Placement], H: torch.Tensor | None = None
) -> tuple[Forecast, torch.Tensor]:
    """Of the packed target of these placements, which they change; and the dense weight to go on with.

    H (in, in): XᵀX of its inputs.
    """
    name = group[0].target.name
    packed, found, reason = cast(Packed, packed_of(gm, name)), dict[str, Any](), ""
    results, line = folded(gm, group, check_finite=True)
    for storage in STORAGES[1:] if H is not None else STORAGES[1:2]:
        try:
            results, kept = folded(gm, group, check_finite=True, storage=storage, H=H)
        except MergeError as error:
            reason = reason or str(error).removeprefix(f"{name}: ")
        else:
            found |= {storage: kept["lost"], f"{storage}_outputs": kept["lost_outputs"]}
    size = sum(t.nbytes for t in packed.tensors.values())
    row = Forecast(name, scheme(packed.format.scheme).title, tuple(packed.shape), line["change"], size,
                   packed.shape.numel() * packed.dtype.itemsize, **found, reason=reason)  # fmt: skip
    now = results[name]
    return row, now.dense() if isinstance(now, Packed) else now
