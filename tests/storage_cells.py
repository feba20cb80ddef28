"""Every method on every storage, step by step: what passes, and with which reason the rest is refused.

    outcomes(method, schemes) -> {step: {scheme: ""}}      passes; or the reason of a refusal; or "FAILED: ..."

One model has a layer of every scheme, each with an input and an output of its own, so that a step runs once for all and each
scheme has numbers of its own. A step that raises is run again with the method on some of the layers: all but the one that the
message names, or on halves, until it is known which layers it is about.
The oracle is the same model with the dequantized weights, and the same adapter on it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from methods import cells
from packed_layers import packed
from torch import nn

import peft_fx as fx
from peft_fx.cli.method_facts import OPTIONS
from peft_fx.errors import PeftFxError
from peft_fx.methods import get_method
from peft_fx.storage.packed import Packed
from peft_fx.storage.schemes import SCHEMES, scheme
from peft_fx.storage.twins import Linear, made
from peft_fx.store.tensors import packed_of, weight_of

SIZE, ROWS = 64, 3
EXACT = 2e-6  # largest difference over the largest value: the same products, perhaps in another order
# Of weights that were packed again: the sum that is rounded may differ in its last bit, and then one code by a step, which of 4
# bits is a fifteenth of its group's range.
NEAR = 0.07
ADAPTER = "peft_fx.adapters."
FAILED = "FAILED"
Found = dict[str, str]  # scheme -> "" or what was wrong
KNOWN = [*cells("PEFT"), *cells("DEFINED")]


# Models


class Layers(nn.Module):
    """A layer for each scheme, each with an input of its own: tensors by the schemes' names."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.layers[name](x[name]) for name in self.layers}


def layer(name: str, kind: str, dense: bool) -> nn.Module:
    """A layer of torch's with a weight of that scheme, or with the same weight dense."""
    torch.manual_seed(0)
    weight = packed(name, SIZE, SIZE)
    new = nn.Embedding(SIZE, SIZE) if kind == "embedding" else Linear(SIZE, SIZE)
    new.to(weight.dtype)
    if not dense:
        return made(new, {"weight": weight})
    new.weight = nn.Parameter(weight.dense(), requires_grad=False)
    return new


def model(schemes: tuple[str, ...], kind: str, *, dense: bool = False) -> nn.Module:
    return Layers({name: layer(name, kind, dense) for name in schemes}).eval()


def inputs(schemes: tuple[str, ...], kind: str) -> dict[str, torch.Tensor]:
    """In the dtypes in which the layers compute. The same numbers whichever schemes there are."""
    ids, x = torch.arange(10).reshape(2, 5), torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1))
    return {name: ids.clone() if kind == "embedding" else x.to(dtype_of(name)).clone() for name in schemes}


@functools.cache
def dtype_of(name: str) -> torch.dtype:
    return packed(name, SIZE, SIZE).dtype


@functools.cache
def captured(schemes: tuple[str, ...], kind: str, *, dense: bool = False) -> torch.fx.GraphModule:
    return fx.capture(model(schemes, kind, dense=dense), (inputs(schemes, kind),))


# Methods


def first(method: str) -> tuple[dict, str]:
    """Options that fit small layers, and the kind of layer: those that the methods' own tests begin with."""
    for name, options, subject in KNOWN:
        if name == method and subject in ("wide", "square", "wide_embedding"):
            return options, "embedding" if subject == "wide_embedding" else "linear"
    return {"peft_type": get_method(method).Config.peft_type, **OPTIONS.get(method, {})}, "linear"


def config(method: str, schemes: tuple[str, ...]) -> dict:
    options = {**first(method)[0], "target_modules": [*schemes]}
    return options | ({"feedforward_modules": [*schemes]} if options.get("feedforward_modules") else {})


class Case:
    """One method on the layers of `schemes`, of a model that has those of `whole`. Everything is made when it is first asked for."""

    def __init__(self, method: str, whole: tuple[str, ...], schemes: tuple[str, ...]):
        self.method, self.whole, self.schemes = method, whole, schemes
        self.kind, self.config = first(method)[1], config(method, schemes)

    def part(self, schemes: tuple[str, ...]) -> Case:
        return Case(self.method, self.whole, schemes)

    def graph(self, *, dense: bool = False) -> torch.fx.GraphModule:
        return captured(self.whole, self.kind, dense=dense)

    def adapted(self, seed: int = 3, *, dense: bool = False) -> torch.fx.GraphModule:
        """The graph with the method on it, its tensors moved away from where they start."""
        base = self.graph(dense=dense)
        torch.manual_seed(2)
        graph = fx.apply(base, self.config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in trained(graph).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return graph

    @functools.cached_property
    def tuned(self) -> torch.fx.GraphModule:
        return self.adapted()

    @functools.cached_property
    def oracle(self) -> torch.fx.GraphModule:
        return self.adapted(dense=True)

    @functools.cached_property
    def output(self) -> dict[str, torch.Tensor]:
        return self.run(self.tuned)

    @functools.cached_property
    def expected(self) -> dict[str, torch.Tensor]:
        return self.run(self.oracle)

    @functools.cached_property
    def slack(self) -> dict[str, float]:
        """What a scheme's own product differs from that with the dense weight: 0, but where it rounds its inputs."""
        own, dense = (self.run(self.graph(dense=d)) for d in (False, True))
        return {name: 2 * error(own[name], dense[name]) + eps(name) for name in self.schemes}

    def run(self, graph: Callable) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            y = graph(inputs(self.whole, self.kind))
        return {name: y[name] for name in self.schemes}

    def gradients(self, graph: Callable, named: dict[str, nn.Parameter]) -> dict[str, dict[str, torch.Tensor]]:
        """Scheme -> gradients of a scalar to which every output contributes differently: of x, and of the adapter's tensors."""
        x = inputs(self.whole, self.kind)
        generator = torch.Generator().manual_seed(4)
        leaves = {n: x[n].requires_grad_() for n in self.schemes if x[n].is_floating_point()} | named
        y = graph(x)
        loss = sum((y[n].float() * torch.randn(y[n].shape, generator=generator)).sum() for n in self.schemes)
        found = dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))
        return {s: {n: g for n, g in found.items() if n == s or belongs(n, s, self.schemes)} for s in self.schemes}


def trained(graph: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in graph.named_parameters() if n.startswith(ADAPTER) and p.requires_grad}


def belongs(name: str, mine: str, schemes: tuple[str, ...]) -> bool:
    """Whether a tensor is part of what acts on a scheme's layer: it is that layer's own, or shared by all."""
    owner = next((s for s in schemes if f".layers.{s}." in name), None)
    return owner in (mine, None)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.float(), theirs.float()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def eps(name: str) -> float:
    """What sums in half precision may differ by that are made in another order; 0 in float32, where EXACT says it."""
    return 0.0 if dtype_of(name) == torch.float32 else 2 * torch.finfo(dtype_of(name)).eps


# Steps: each yields (scheme, what is wrong, or "")


def close(ours: dict, theirs: dict, slack: dict[str, float], what: str = "outputs") -> Iterator[tuple[str, str]]:
    for name, mine in ours.items():
        far = error(mine, theirs[name])
        yield name, "" if far <= EXACT + slack[name] else f"{what} differ by {far:.1e}"


def same(ours: dict, theirs: dict, what: str) -> Iterator[tuple[str, str]]:
    for name, mine in ours.items():
        yield name, "" if torch.equal(mine, theirs[name]) else f"{what} are not the same bits"


def forward(case: Case) -> Iterator[tuple[str, str]]:
    base = case.run(case.graph())
    for name, text in close(case.output, case.expected, case.slack):
        yield name, text or ("" if error(case.output[name], base[name]) > 1e-5 else "the adapter does nothing")


def gradient(case: Case) -> Iterator[tuple[str, str]]:
    ours, theirs = (case.gradients(g, trained(g)) for g in (case.tuned, case.oracle))
    for name in case.schemes:
        assert ours[name].keys() == theirs[name].keys()
        far = max(error(ours[name][n], theirs[name][n]) for n in theirs[name])
        yield name, "" if far <= 10 * EXACT + case.slack[name] else f"gradients differ by {far:.1e}"


def merge_dense(case: Case) -> Iterator[tuple[str, str]]:
    """Against the oracle's merge: the same rounding of the same sum. A weight that does not change stays packed."""
    merged, expected = (fx.merge(g, storage="dense") for g in (case.tuned, case.oracle))
    slack = {s: eps(s) for s in case.schemes}
    names = {s: f"layers.{s}.weight" for s in case.schemes}
    weights = [{s: weight_of(g, n) for s, n in names.items()} for g in (merged, expected)]
    wrong = {s: text for s, text in close(*weights, slack, "weights") if text}
    base = case.graph(dense=True)
    for s, n in names.items():
        if (packed_of(merged, n) is not None) != torch.equal(weights[1][s], weight_of(base, n)):
            wrong[s] = "the weight is packed still, or dense for nothing"
    slack = {s: slack[s] + (case.slack[s] if packed_of(merged, n) is not None else 0) for s, n in names.items()}
    for name, text in close(case.run(merged), case.run(expected), slack):
        yield name, wrong.get(name) or text


def unmerge(case: Case) -> Iterator[tuple[str, str]]:
    again = fx.unmerge(fx.merge(case.tuned, storage="dense"))
    before, after = case.tuned.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(equal(before[n], after[n]) for n in before)
    yield from same(case.run(again), case.output, "outputs after unmerge")


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits; of float8 too, which has no comparison."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if (
        a.dim() and a.shape == b.shape) else torch.equal(a, b)  # fmt: skip


def requantize(case: Case) -> Iterator[tuple[str, str]]:
    """What is kept is the scheme's own rounding of the merged weight, the graph computes with it, and unmerge brings all back."""
    merged = fx.merge(case.tuned, storage="requantize")
    back = dict(same(case.run(fx.unmerge(merged)), case.output, "outputs after unmerge"))
    exact, names, wrong = fx.merge(case.oracle, storage="dense"), {s: f"layers.{s}.weight" for s in case.schemes}, {}
    for s, n in names.items():
        kept, before, W = packed_of(merged, n), packed_of(case.graph(), n), weight_of(exact, n)
        if not isinstance(kept, Packed):
            wrong[s] = "the weight is dense"
            continue
        again = before.again(scheme(s).quantize(W.float(), before)) if not torch.equal(W, before.dense()) else before
        if (far := distance(kept.dense(), again.dense())) > NEAR:
            wrong[s] = f"packed again, it is {far:.1e} from the scheme's rounding"
        with torch.no_grad():
            W.copy_(kept.dense())
    for name, text in close(case.run(merged), case.run(exact), case.slack):
        yield name, wrong.get(name) or back[name] or text


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of two weights, relative to their norm."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def hotswap(case: Case) -> Iterator[tuple[str, str]]:
    other, graph = case.adapted(seed=5), case.adapted()
    with tempfile.TemporaryDirectory() as folder:
        fx.save_adapter(other, folder)
        fx.hotswap(graph, folder)
    yield from same(case.run(graph), case.run(other), "outputs after the swap")


def compiled(case: Case) -> Iterator[tuple[str, str]]:
    torch._dynamo.reset()
    run = torch.compile(case.tuned, fullgraph=True, backend="aot_eager")
    expected = case.gradients(case.tuned, trained(case.tuned))
    found = case.gradients(run, trained(case.tuned))
    torch._dynamo.reset()
    for name in case.schemes:
        far = max(error(found[name][n], g) for n, g in expected[name].items())
        yield name, "" if far <= 10 * EXACT + eps(name) else f"compiled gradients differ by {far:.1e}"


def export(case: Case) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        fx.export(case.tuned, Path(folder) / "it.pt2")
        again = fx.load(Path(folder) / "it.pt2")
        kept = {s: packed_of(again, f"layers.{s}.weight") is not None for s in case.schemes}
        for name, text in same(case.run(again), case.output, "outputs of the file"):
            yield name, text or ("" if kept[name] else "the file's weight is dense")


def face(case: Case) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        fx.save_adapter(case.tuned, folder)
        tuned = fx.PeftModel.from_pretrained(model(case.whole, case.kind), folder).eval()
        yield from close(case.run(tuned), case.output, case.slack)


STEPS = {
    "forward": forward, "gradient": gradient, "merge dense": merge_dense, "unmerge": unmerge, "requantize": requantize,
    "hotswap": hotswap, "compile": compiled, "export": export, "face": face,
}  # fmt: skip


def outcomes(method: str, schemes: tuple[str, ...] = tuple(SCHEMES)) -> dict[str, Found]:
    """Step -> scheme -> "", why it is refused, or what failed."""
    case = Case(method, schemes, schemes)
    return {step: outcome(run, case) for step, run in STEPS.items()}


def outcome(run: Callable, case: Case) -> Found:
    schemes = case.schemes
    try:
        return {s: f"{FAILED}: {why}" if why else "" for s, why in run(case)}
    except Exception as problem:
        text = str(problem)
        if len(schemes) > 1:
            named = tuple(s for s in schemes if text.startswith(f"layers.{s}."))
            rest = tuple(s for s in schemes if s not in named)
            parts = (named, rest) if named else (schemes[: len(schemes) // 2], schemes[len(schemes) // 2 :])
            found = {s: why for part in parts for s, why in outcome(run, case.part(part)).items()}
            return found if any(found.values()) else dict.fromkeys(schemes, f"{FAILED}: only all together: {text}")
        for prefix in (f"layers.{schemes[0]}.weight: ", f"layers.{schemes[0]}: ", "refused: "):
            text = text.removeprefix(prefix)
        refused = isinstance(problem, PeftFxError)
        return {schemes[0]: text if refused else f"{FAILED}: {type(problem).__name__}: {text}"}
