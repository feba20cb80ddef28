"""What each method can do, asked of its code: nothing is written down here but what to ask it with."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import fx, nn

from ..config import AdapterConfig
from ..engine.adding import allocate
from ..engine.merging import theta_of
from ..errors import RecipeError
from ..fields import default_of
from ..methods import INTERNAL, METHODS, get_method
from ..methods.base import Additive, Branch, InputMap, Method, OutputMap, Rewrite, Substitute, Tensor
from ..passes.forms.lowering import forms_of, to_canonical
from ..planning.kinds import stored_shape
from ..planning.plan import ROOT_KEY, Placement, make_plan
from ..store.tensors import ADAPTERS
from ..target import ModuleRecord, ModuleTable

SIZE = 256  # features of the targets that methods are asked about: what default block sizes divide
KINDS = {
    "linear": (SIZE, SIZE), "conv1d": (SIZE, SIZE, 3), "conv2d": (SIZE, SIZE, 3, 3), "conv3d": (SIZE, SIZE, 3, 3, 3),
    "embedding": (SIZE, SIZE), "norm": (SIZE,), "expert": (2, SIZE, SIZE),
}  # fmt: skip
# Options without which a config is not complete, or that choose a variant which has a line of its own.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100},
    "DORA": {"use_dora": True},
    "IA3": {"feedforward_modules": []},
    "IA3_INPUT": {"feedforward_modules": "layer"},
    "MISS_BAT": {"init_weights": "bat"},
    "TRAINABLE_TOKENS": {"token_indices": [0, 1]},
}
SHAPES = (Additive, Branch, InputMap, OutputMap, Rewrite, Substitute)
IDENTITY = 1e-5  # largest change, relative to the weight, that counts as none


@dataclass(frozen=True)
class Facts:
    """kinds: operator kind -> "activation", "weight", or "" where it is refused; refused: kind -> reason.

    ranks: adapters of another rank can be swapped in. neutral: of other targets too. tensors: those on a linear layer, or
    on the first kind that is taken. parameters: their trained elements, `SIZE` features each way.
    """

    name: str
    method: Method
    config: AdapterConfig | None
    shape: str
    kinds: dict[str, str]
    refused: dict[str, str]
    merge: bool
    ranks: bool
    neutral: bool
    shared: bool
    identity: bool | None
    tensors: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        return sum(torch.Size(t.shape).numel() for t in self.tensors.values() if t.trainable)

    @property
    def title(self) -> str:
        """The first line of the method's file."""
        return self.text.partition("\n")[0]

    @property
    def text(self) -> str:
        return inspect.getdoc(inspect.getmodule(type(self.method))) or inspect.getdoc(type(self.method)) or self.name

    @property
    def papers(self) -> list[str]:
        return re.findall(r"arXiv (\d{4}\.\d{4,5})", self.text)

    @property
    def fields(self) -> dict[str, tuple[object, str]]:
        """The config's own fields: name -> (default, why other values are refused, or "")."""
        common = {f.name for f in dataclasses.fields(AdapterConfig)}
        if self.config is None:
            return {}
        refused = self.config.refused
        own = [f for f in dataclasses.fields(self.config) if f.name not in common]
        required = dataclasses.MISSING
        return {f.name: ("required" if (d := default_of(f)) is required else d, refused.get(f.name, "")) for f in own}


def names() -> list[str]:
    """Methods with a line of their own: what a config can name, and the variants in OPTIONS."""
    return sorted(name for name in METHODS if name not in INTERNAL or name in OPTIONS)


@cache
def facts(name: str) -> Facts:
    """Plans the method called `name` on a model of one layer, for every kind. Raises RecipeError if there is none."""
    method = get_method(name)
    kinds: dict[str, str] = {}
    refused: dict[str, str] = {}
    first: list[Placement] = []
    for kind in KINDS:
        found = planned(method, kind)
        if isinstance(found, str):
            kinds[kind], refused[kind] = "", found
            continue
        forms = forms_of(found[0].rule)
        kinds[kind] = "activation" if forms and all(f.kinds is None or kind in f.kinds for f in forms) else "weight"
        first = first or found
    merge = not method.no_weight
    neutral = [p.rule.neutral(p.target, p.config) for p in first]
    several = len(first) > 1
    tensors = {f"{p.target.parameter}.{n}" if several else n: t for p in first for n, t in p.tensors.items()}
    return Facts(
        name=name.upper(), method=method, config=first[0].config if first else None,
        shape=next((s.__name__ for s in SHAPES if isinstance(method, s)), type(method).__name__),
        kinds=kinds, refused=refused, merge=merge, ranks=any(t.pad for t in tensors.values()), neutral=None not in neutral,
        shared=any((t.key or "").startswith(ROOT_KEY) for t in tensors.values()),
        identity=all(map(starts_as_identity, first)) if first else None, tensors=tensors,
    )  # fmt: skip


def planned(method: Method, kind: str) -> list[Placement] | str:
    """What the method puts on the one layer of that kind, or why it does not."""
    options = {"target_parameters": ["layer.weight"]} if kind == "expert" else {"target_modules": ["layer"]}
    try:
        chosen: dict[str, Any] = {"target_modules": [], **OPTIONS.get(method.name, {}), **options}
        config = method.Config(**chosen)
        found = make_plan(table_of(kind), "probe", config, strict=False)
    except RecipeError as error:
        return str(error)
    return str(found.refusals[0].reason) if found.refusals else list(found.placements)


def table_of(kind: str) -> ModuleTable:
    """A model of one layer."""
    type_ = {"linear": "Linear", "embedding": "Embedding", "norm": "LayerNorm", "expert": "Experts"}.get(kind)
    type_ = type_ or kind.capitalize()
    parameters = {"weight": KINDS[kind]} | ({} if kind in ("embedding", "expert") else {"bias": (SIZE,)})
    return ModuleTable((ModuleRecord("", "Model", ("Model",)), ModuleRecord("layer", type_, (type_,), parameters)))


def starts_as_identity(p: Placement) -> bool:
    """Whether a fresh adapter leaves a random weight and its bias as they are."""
    method, model = p.rule, fx.GraphModule(nn.Module(), fx.Graph())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        W, b = torch.randn(stored_shape(p.target)), torch.randn(SIZE) if p.target.has_bias else None
        model.layer = nn.Module()
        model.layer.register_buffer(p.target.parameter, W)
        if p.target.has_bias:
            model.layer.register_buffer(p.target.bias, b)
        model.add_submodule(ADAPTERS, nn.Module())
        allocate(model, p, None, trainable=False)
        theta = theta_of(model, p)
        if method.no_weight:
            return not cast(Branch, method).delta(torch.randn(4, p.target.in_features), theta, p.target, p.config).any()
        new_W, new_b = method.weight(to_canonical(W, p.target), b, theta, p.target, p.config)
    changed = [(new_W - to_canonical(W, p.target)).abs().max() / W.abs().max()]
    if new_b is not None:
        changed.append((new_b - (0 if b is None else b)).abs().max())
    return max(changed).item() <= IDENTITY
