"""How a packed weight is kept after a merge, and what that loses of what the adapters do.

dense        W_merged in the dtype in which the layer computes
requantize   packed again as the package packs it, or by zero points that take the update, where that loses less
calibrated   packed again so that products with given inputs X stay (`storage/grids.py`), on the scales that lose less:
             those that the weight has, or those that the package would give it now

change = ||W_merged - W|| / ||W||     lost = ||kept - W_merged|| / ||W_merged - W||     with X: the same of X Wᵀ
"""

from __future__ import annotations

from contextlib import suppress

import torch

from ..errors import MergeError, StorageError
from ..passes.forms.lowering import from_canonical, to_canonical
from ..storage.grids import Grid, compensated
from ..storage.packed import Packed
from ..storage.schemes import scheme
from ..target import Target

STORAGES = ("dense", "requantize", "calibrated")


def packed_again(packed: Packed, W: torch.Tensor, target: Target, storage: str, H: torch.Tensor | None) -> Packed:
    """W, stored layout, float32 or wider, in the format of `packed`. H (in, in): XᵀX, for "calibrated".

    Raises MergeError naming the target, where the scheme or the target has no such way.
    """
    if tuple(W.shape) != tuple(packed.shape):
        raise MergeError(f"{target.name}: the merged weight has another shape; merge with storage='dense'")
    try:
        new = requantized(packed, W) if storage == "requantize" else calibrated(packed, W, target, H)
    except StorageError as error:
        raise MergeError(f"{target.name}: {error}") from error
    base = packed.tensors  # whose own tensors no swap may write to
    return new.again({name: t.clone() if t is base[name] else t for name, t in new.tensors.items()})


def requantized(packed: Packed, W: torch.Tensor) -> Packed:
    storage = scheme(packed.format.scheme)
    new = packed.again(storage.quantize(W, packed))
    shifted = storage.fold(W - packed.dense().to(W.dtype), packed)
    if shifted is None:
        return new
    return min((packed.again(shifted), new), key=lambda p: float((p.dense().to(W.dtype) - W).norm()))


def calibrated(packed: Packed, W: torch.Tensor, target: Target, H: torch.Tensor | None) -> Packed:
    if H is None:
        raise MergeError(
            f"{target.name}: storage='calibrated' is for weights that one linear operator reads: merge with "
            "storage='requantize' or 'dense'"
        )
    storage, exact = scheme(packed.format.scheme), to_canonical(W, target)
    candidates = [packed]
    with suppress(StorageError):  # then the scales that there are will do
        candidates.append(packed.again(storage.quantize(W, packed)))
    found = []
    for like in candidates:
        levels, scale, offset = storage.grid(list(like.tensors.values()), like.format).over(W.shape)
        codes = compensated(exact, Grid(levels, to_canonical(scale, target), to_canonical(offset, target)), H)
        found.append(like.again(storage.pack(from_canonical(codes, target).contiguous(), like)))
    if (shifted := storage.fold(W - packed.dense().to(W.dtype), packed)) is not None:
        found.append(packed.again(shifted))
    return min(found, key=lambda p: float(power(to_canonical(p.dense(), target).to(exact.dtype) - exact, H)))


def measured(
    kept: torch.Tensor | Packed, W: torch.Tensor, old: torch.Tensor, target: Target, H: torch.Tensor | None
) -> dict[str, float | None]:
    """change, lost, and lost_outputs: None without H. W: the exact sum, old: the weight before."""
    now = (kept.dense() if isinstance(kept, Packed) else kept).to(W.dtype)
    old = old.to(W.dtype)
    error, change = now - W, W - old
    outputs = None
    if H is not None:
        outputs = ratio(*(power(to_canonical(d, target), H).sqrt() for d in (error, change)))
    return {
        "change": ratio(change.norm(), old.norm()),
        "lost": ratio(error.norm(), change.norm()),
        "lost_outputs": outputs,
    }


def power(W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """||X Wᵀ||², of W (out, in)."""
    return ((W @ H.to(W.dtype)) * W).sum().clamp_min(0)


def ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a / b) if b else 0.0
