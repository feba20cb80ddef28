"""Files of adapters that began with a part of the base weight: PiSSA and OLoRA take it out of W, and train beside the rest.

    y = (W - s B0 A0) x + s B A x = W x + s [B, -B0] [A; A0] x        A0, B0: the start, which W gives again

PEFT changes the base at each load. Here the base stays what it is, and the adapter becomes LoRA of twice the rank, as PEFT's
own conversion makes it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import fx

from ..config import AdapterConfig
from ..errors import AdapterFileError
from ..methods.lora import LoRA, LoraConfig
from ..missing import init_of
from ..passes.forms.lowering import to_canonical
from ..planning.plan import Placement
from ..store.state import state_of
from ..store.tensors import REPLACED, find_kept, weight_of
from .transitions import planned


def pissa(W: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(A0, B0) from the r largest singular values."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    roots = (S[:r] / scaling).sqrt()
    return roots.unsqueeze(1) * V[:r], U[:, :r] * roots


def olora(W: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(A0, B0) from the first r columns of an orthogonal basis."""
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


STARTS = {"PiSSA": pissa, "OLoRA": olora}


def on_whole_base(gm: fx.GraphModule, adapter: str, config: AdapterConfig, tensors: dict, where: str) -> tuple:
    """(config, file key -> tensor) of a file, for the base weights as they are; any other file's as they came.

    Raises AdapterFileError for a weight that gives no start.
    """
    init = init_of(getattr(config, "init_lora_weights", None))
    if init is None or init.name not in STARTS or config.peft_type != "LORA":
        return config, tensors
    new, state = dict(tensors), state_of(gm)
    for p in planned(state, adapter, config).placements:
        for name, added in start(gm, p, STARTS[init.name], where).items():
            key, spec = p.file_key(name), p.tensors[name]
            if key in tensors and tensors[key].shape == spec.shape:  # whoever matches the file refuses any other
                axis = spec.pad[0][0]  # the rank's
                new[key] = torch.cat([tensors[key].float(), added.to(tensors[key].device)], dim=axis)
    config = cast(LoraConfig, config)
    more = math.sqrt(2) if config.use_rslora else 2
    doubled = replace(
        config,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={k: 2 * r for k, r in config.rank_pattern.items()},
        alpha_pattern={k: more * alpha for k, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
    return doubled, new


@torch.no_grad()
def start(gm: fx.GraphModule, p: Placement, of_weight, where: str) -> dict[str, torch.Tensor]:
    """What is appended to a placement's factors. Tables of embeddings begin as plain LoRA's, without a part of the weight."""
    method = LoRA()
    A, B, _ = method.names(p.target)
    if A not in p.tensors or A in p.shared:
        return {}
    if p.target.reads_ids:
        return {name: torch.zeros(p.tensors[name].shape) for name in (A, B)}
    name = p.target.tensor_name
    shelf = f"{REPLACED}.{name}"
    W = weight_of(gm, name if find_kept(gm, shelf) is None else shelf)
    if p.target.kind != "linear" or W.is_meta:
        init = str(cast(LoraConfig, p.config).init_lora_weights)
        reason = "weights on meta have no numbers" if W.is_meta else f"there is none for kind {p.target.kind}"
        raise AdapterFileError(f"{where}: {p.target.name}: {init!r} takes its start from the weight: {reason}")
    r, scaling = method.rank(p.target, p.config), method.scaling(p.target, p.config)
    A0, B0 = of_weight(to_canonical(W, p.target).float(), r, scaling)
    return {A: A0, B: -B0}
