"""AdaMSS's clusters, its files in pieces, and the allocation of subspaces beside PEFT's and a plain one."""

import importlib.util
import json

import conformance as c
import pytest
import torch
from safetensors.torch import load_file

import peft_fx as fx
from peft_fx.methods import adamss
from peft_fx.store.tensors import get_tensor
from peft_fx.training.adamss import SubspaceAllocator

pytestmark = pytest.mark.slow

TWO = {"peft_type": "ADAMSS", "target_modules": ["layer"], "r": 6, "num_subspaces": 3, "subspace_rank": 2}
LAYER = "base_model.model.layer"
EXPERTS = {**TWO, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def ours(tuned, name, layer="layer.on_weight"):
    return get_tensor(tuned, f"peft_fx.adapters.default.{layer}.{name}").detach()


def trained(subject, options, folder, seed=3):
    tuned = fx.apply(c.captured(subject), options)
    c.randomise(tuned, seed)
    fx.save_adapter(tuned, folder)
    return tuned


# Against PEFT's start


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("subject", ["wide", "wide_without_bias"])
def test_clusters_directions_and_ranks_start_as_peft_s(subject, dynamic):
    options = {**TWO, "subspace_rank": 4, "use_dynamic_rank": dynamic, "svd_threshold": 0.3}
    tuned = fx.apply(c.captured(subject), options)
    theirs = c.quiet(c.peft.get_peft_model, c.build(subject), c.peft_config(options)).base_model.model.layer
    assert torch.allclose(ours(tuned, "adamss_newB"), theirs.adamss_newB["default"], atol=1e-6)
    ranks = []
    for i, A in enumerate(theirs.adamss_A["default"]):
        rows = ours(tuned, "rows")[i].nonzero().flatten()
        assert rows.tolist() == theirs.seg_result["default"][i].tolist()
        # the same first direction, whatever its sign; PEFT finds it by a randomised decomposition
        assert abs(float(ours(tuned, "adamss_A")[i, 0] @ A[0].detach())) > 0.99
        ranks.append(len(A))
    assert ours(tuned, "components").sum(1).tolist() == ranks
    assert not dynamic or len(set(ranks)) > 1
    assert not ours(tuned, "adamss_A")[~ours(tuned, "components")].any()


def test_components_that_a_subspace_does_not_have_get_no_gradient():
    tuned = fx.apply(c.captured("wide"), {**TWO, "num_subspaces": 5, "subspace_rank": 4})
    c.randomise(tuned)
    c.loss(c.floats(tuned(**c.inputs("wide")))).backward()
    A, B = (get_tensor(tuned, f"peft_fx.adapters.default.layer.on_weight.adamss_{n}").grad for n in "AB")
    missing = ~ours(tuned, "components")
    assert missing.any() and not A[missing].any()
    assert not B[(ours(tuned, "rows").unsqueeze(-1) & missing.unsqueeze(1)).any(0)].any()


def test_without_scikit_learn_it_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(adamss, "find_spec", lambda name: None if name == "sklearn" else importlib.util.find_spec(name))
    with pytest.raises(fx.RecipeError, match="pip install 'peft-fx\\[adamss\\]'"):
        fx.apply(c.captured("wide"), TWO)


# Files in pieces


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{LAYER}.adamss_B.1"), "missing: base_model.model.layer.adamss_B.1"),
        (lambda t: t.update({f"{LAYER}.adamss_A.3": torch.ones(2, 6)}), "not expected: base_model.model.layer.adamss_A.3"),
        (lambda t: t.update({f"{LAYER}.adamss_A.0": torch.ones(2, 5)}), "piece 0: expected numbers of shape [at most 2, 6], got [2, 5]"),
        (lambda t: t.update({f"{LAYER}.adamss_A.1": torch.ones(3, 6)}), "piece 1: expected numbers of shape [at most 2, 6], got [3, 6]"),
        (lambda t: t.update({f"{LAYER}.adamss_A.0": torch.ones(1, 6)}), "adamss_B: piece 0: expected numbers of shape"),
        (lambda t: t.update({f"{LAYER}.adamss_B.2": torch.ones(9, 2)}), "the file was trained on another base"),
        (lambda t: t.update({f"{LAYER}.adamss_B.2": torch.ones(4, 2, dtype=torch.int8)}), "torch.int8"),
        (lambda t: t.update({f"{LAYER}.adamss_newB": torch.ones(6, 8)}), "expected shape [6, 9], got [6, 8]"),
    ],
    ids=range(8),
)  # fmt: skip
def test_pieces_that_do_not_fit_are_refused_and_nothing_has_changed(change, says, tmp_path):
    tuned = trained("wide", TWO, tmp_path)
    before, tensors = c.run(tuned, "wide"), {k: t.clone() for k, t in tuned.state_dict().items()}
    c.rewrite(tmp_path, lambda t: (change(t), t)[1])
    for act in (fx.hotswap, lambda gm, folder: fx.load_adapter(gm, folder, "second")):
        with pytest.raises(fx.AdapterFileError) as error:
            act(tuned, tmp_path)
        assert says in str(error.value)
    assert all(torch.equal(t, tensors[k]) for k, t in tuned.state_dict().items())
    assert c.error(c.run(tuned, "wide"), before) == 0
    assert fx.load_adapter(tuned, _good(tmp_path), "second")


def _good(folder):
    trained("wide", TWO, folder / "good")
    return folder / "good"


def test_a_lower_rank_is_swapped_in_and_saved_as_it_was(tmp_path):
    slot = fx.prepare_hotswap(fx.apply(c.captured("wide"), TWO), max_rank=3)
    compiled = torch.compile(slot, fullgraph=True, backend="aot_eager")
    c.run(compiled, "wide")
    for rank in (1, 3, 2):
        other = trained("wide", {**TWO, "subspace_rank": rank}, tmp_path / str(rank), seed=rank)
        with torch.compiler.set_stance("fail_on_recompile"):
            fx.hotswap(compiled, tmp_path / str(rank))
            assert c.error(c.run(compiled, "wide"), c.run(other, "wide")) <= 1e-6
        fx.save_adapter(slot, tmp_path / "again")
        first, again = (load_file(tmp_path / d / "adapter_model.safetensors") for d in (str(rank), "again"))
        assert c.error(again, first) == 0


def test_a_stack_of_experts_is_clustered_filed_and_read_one_by_one(tmp_path):
    tuned = trained("mixtral", EXPERTS, tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    experts = len(ours(tuned, "rows", "model.layers.0.mlp.experts.on_down_proj"))
    assert sum("layers.0" in k and "adamss_A" in k for k in file) in (3 * experts, 6 * experts)
    again = fx.load_adapter(c.captured("mixtral"), tmp_path)
    assert c.error(c.run(again, "mixtral"), c.run(tuned, "mixtral")) <= 1e-6
    assert c.error(c.run(fx.merge(tuned), "mixtral"), c.run(tuned, "mixtral")) <= 1e-5


# Allocation

ASA = {
    **TWO, "target_modules": ["q_proj", "down_proj"], "use_asa": True, "init_warmup": 1, "final_warmup": 9,
    "asa_target_subspaces": 4,
}  # fmt: skip


def pair(options, folder):
    theirs = c.peft_model("llama", options)
    c.save_peft(theirs, folder)
    return theirs, fx.load_adapter(c.captured("llama"), folder, trainable=True)


def train(model, allocate, optimizer, steps=13):
    """File key -> tensor after the last step; PEFT's frozen subspaces have no gradient then."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        c.loss(c.floats(model(**c.inputs("llama")))).backward()
        optimizer.step()
        allocate(step)
        optimizer.zero_grad()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_more_than_peft_s_target_leaves_what_peft_leaves(optimizer, tmp_path):
    theirs, tuned = pair({**ASA, "mask_interval": 9, "asa_target_subspaces": 5}, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"asa_target_subspaces": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tuned = fx.load_adapter(c.captured("llama"), tmp_path, trainable=True)
    allocator = SubspaceAllocator(tuned)
    train(theirs, theirs.base_model.update_and_allocate, OPTIMIZERS[optimizer])
    train(tuned, allocator.update_and_allocate, OPTIMIZERS[optimizer])
    found = c.saved(lambda f: fx.save_adapter(tuned, f))
    assert sum(int(s.learning.sum()) for s in allocator.subspaces) == 4
    assert c.error(found, c.saved(lambda f: c.save_peft(theirs, f))) <= 1e-4


class Plain:
    """The allocation as its formulas say, over PEFT's lists of parameters."""

    def __init__(self, theirs):
        self.config, self.means = theirs.peft_config["default"], {}
        self.layers = [m for m in theirs.modules() if hasattr(m, "adamss_A")]
        self.learning = [(m, i) for m in self.layers for i in range(len(m.adamss_A["default"]))]
        self.total = len(self.learning)

    def parts(self, place):
        layer, i = place
        return layer.adamss_A["default"][i], layer.adamss_B["default"][i]

    def __call__(self, step):
        a = self.config
        if not a.init_warmup <= step <= a.final_warmup:
            return
        for place in self.learning:
            for p in self.parts(place):
                I, U = self.means.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
                now = (p * p.grad).detach().abs()
                U = a.asa_uncertainty_beta * U + (1 - a.asa_uncertainty_beta) * (now - I).abs()
                self.means[p] = a.asa_importance_beta * I + (1 - a.asa_importance_beta) * now, U
        if step % a.mask_interval:
            return
        left = (a.final_warmup - step) / (a.final_warmup - a.init_warmup)
        T = int(a.asa_target_subspaces + (self.total - a.asa_target_subspaces) * left**a.asa_schedule_exponent)
        self.learning.sort(
            key=lambda place: -sum(float(torch.mean(I * U)) for I, U in map(self.means.get, self.parts(place)))
        )
        for place in self.learning[T:]:
            for p in self.parts(place):
                p.requires_grad, p.grad = False, None
        self.learning, self.means = self.learning[:T], {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_allocation_is_the_plain_one_step_by_step(optimizer, compiled, tmp_path):
    options = {**ASA, "mask_interval": 3, "asa_schedule_exponent": 1.0, "use_dynamic_rank": True, "svd_threshold": 0.5}
    theirs, tuned = pair(options, tmp_path)
    allocator, plain = SubspaceAllocator(tuned), Plain(theirs)
    model, counts = torch.compile(tuned, fullgraph=True, backend="aot_eager") if compiled else tuned, []

    def allocate(step):
        allocator.update_and_allocate(step)
        counts.append(sum(int(s.learning.sum()) for s in allocator.subspaces))

    train(theirs, plain, OPTIMIZERS[optimizer])
    c.loss(c.floats(model(**c.inputs("llama")))).backward()
    model.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, allocate, OPTIMIZERS[optimizer])
    assert c.error(c.saved(lambda f: fx.save_adapter(tuned, f)), c.saved(lambda f: c.save_peft(theirs, f))) <= 1e-4
    assert counts[0] == plain.total and counts[-1] == len(plain.learning) == 4 and len(set(counts)) > 2
    for layer, s in zip(plain.layers, allocator.subspaces, strict=True):
        assert s.learning.tolist() == [
            any(m is layer and i == j for m, i in plain.learning) for j in range(len(s.learning))
        ]


def test_subspaces_that_have_stopped_keep_the_outputs_and_get_no_gradient(tmp_path):
    _, tuned = pair({**ASA, "mask_interval": 1, "asa_target_subspaces": 1}, tmp_path)
    allocator = SubspaceAllocator(tuned)
    train(tuned, allocator.update_and_allocate, OPTIMIZERS["SGD"], steps=10)
    before = {p: p.detach().clone() for p in tuned.parameters() if p.requires_grad}
    c.loss(c.floats(tuned(**c.inputs("llama")))).backward()
    changed = [p for p in before if p.grad.any()]
    assert len(changed) == 2  # A and B of the one that is left
    del allocator
    tuned.zero_grad()
    c.loss(c.floats(tuned(**c.inputs("llama")))).backward()
    assert all(p.grad.any() for p in before)


def test_experts_are_allocated_one_by_one():
    tuned = fx.apply(
        c.captured("mixtral"),
        {
            **EXPERTS,
            "use_asa": True,
            "init_warmup": 0,
            "final_warmup": 4,
            "mask_interval": 2,
            "asa_target_subspaces": 5,
        },
    )
    c.randomise(tuned)
    allocator = SubspaceAllocator(tuned)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
    for step in range(6):
        c.loss(c.floats(tuned(**c.inputs("mixtral")))).backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
    assert sum(int(s.learning.sum()) for s in allocator.subspaces) == 5
    assert (
        allocator.subspaces[0].learning.shape
        == ours(tuned, "rows", "model.layers.0.mlp.experts.on_gate_up_proj").shape[:2]
    )


@pytest.mark.parametrize(
    "options", [{**TWO, "use_asa": False}, {"peft_type": "LORA", "target_modules": ["layer"]}], ids=str
)
def test_an_allocation_needs_use_asa(options):
    with pytest.raises(fx.RecipeError, match="use_asa=True"):
        SubspaceAllocator(fx.apply(c.captured("wide"), options))


def test_a_call_without_gradients_is_refused():
    options = {**TWO, "use_asa": True, "init_warmup": 0, "final_warmup": 4}
    with pytest.raises(fx.RecipeError, match="between backward and zero_grad"):
        SubspaceAllocator(fx.apply(c.captured("wide"), options)).update_and_allocate(1)
