"""Several adapters as one: PEFT's results where PEFT is right, else the definition."""

import copy
import warnings

import misuse
import peft
import pytest
import torch
from graphs import inputs, model_of
from marks import quick

import peft_fx

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
EVERY = [
    "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip


def pair(folder, name="tied_llama", **second):
    """(PEFT's model, the captured graph) with adapters a and b."""
    torch.manual_seed(1)
    reference = peft.get_peft_model(copy.deepcopy(model_of(name)), peft.LoraConfig(**LORA), "a")
    reference.add_adapter("b", peft.LoraConfig(**{**LORA, **second}))
    reference.save_pretrained(folder)
    graph = peft_fx.capture(model_of(name), kwargs=inputs(name))
    for adapter in ("a", "b"):
        graph = peft_fx.load_adapter(graph, folder / adapter, adapter)
    return reference, graph


def output(model, name="tied_llama"):
    with torch.no_grad():
        return model(**inputs(name)).logits


@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.5, -0.5]], ids=str)
@pytest.mark.parametrize("kind", quick(EVERY, "ties"))
def test_pefts_results(tmp_path, kind, weights, monkeypatch):
    reference, graph = pair(tmp_path)
    options = dict(density=0.5) if kind not in ("linear", "cat", "svd") else {}
    # PEFT draws initial values first; the same mask for both then, whatever was drawn
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.arange(p.numel()) % 3 > 0).view(p.shape).to(p))
    reference.add_weighted_adapter(["a", "b"], weights, "c", kind, **options)
    new = peft_fx.combine(graph, ["a", "b"], weights, "c", kind, **options)
    reference.set_adapter("c")
    expected, found = output(reference.eval()), output(peft_fx.set_adapter(new, "c"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(output(new), output(graph))  # it does not act by itself


def deltas(graph, adapter):
    """Target -> W' - W in float64."""
    base = dict(graph.named_parameters())
    merged = peft_fx.merge(peft_fx.set_adapter(graph, adapter))
    return {
        n: p.double() - base[n].double()
        for n, p in merged.named_parameters()
        if n in base and not torch.equal(p, base[n])
    }


def assert_sum(graph, name, weights, adapters=("a", "b")):
    parts = [deltas(graph, a) for a in adapters]
    whole = deltas(graph, name)
    targets = {t for part in parts for t in part}
    assert whole.keys() == targets and targets
    for target in targets:
        expected = sum(w * part[target] for w, part in zip(weights, parts, strict=True) if target in part)
        assert (whole[target] - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_rslora_other_ranks_and_patterns_sum_to_the_definition(tmp_path, kind):
    """PEFT is off by sqrt(r) with use_rslora, and takes the largest rank of all layers for each."""
    torch.manual_seed(0)
    graph = peft_fx.apply(peft_fx.capture(model_of("tied_llama"), kwargs=inputs("tied_llama")),
                          peft_fx.LoraConfig(**{**LORA, "use_rslora": True, "rank_pattern": {"down_proj": 2}}), "a")  # fmt: skip
    second = {**LORA, "r": 2, "target_modules": ["q_proj", "o_proj"]}
    graph = peft_fx.apply(graph, peft_fx.LoraConfig(**second), "b")
    graph = peft_fx.combine(graph, ["a", "b"], [0.5, -2.0], "c", kind, **({"svd_rank": 6} if kind == "svd" else {}))
    assert_sum(graph, "c", [0.5, -2.0])
    peft_fx.save_adapter(graph, tmp_path, "c")
    again = peft.PeftModel.from_pretrained(model_of("tied_llama"), tmp_path)
    torch.testing.assert_close(output(again), output(peft_fx.set_adapter(graph, "c")), atol=1e-4, rtol=1e-4)


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = torch.nn.Conv1d(3, 4, 3), torch.nn.Conv2d(3, 4, 2), torch.nn.Conv3d(3, 4, 2)
        self.rows = torch.nn.Embedding(5, 6)

    def forward(self, x, y, z, ids):
        return self.one(x).sum() + self.two(y).sum() + self.three(z).sum() + self.rows(ids).sum()


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_convolutions_and_embeddings(kind):
    """PEFT's svd crashes on conv1d and conv3d."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6), torch.randn(1, 3, 5, 5), torch.randn(1, 3, 4, 4, 4), torch.tensor([0, 3])
    config = peft_fx.LoraConfig(r=2, target_modules=["one", "two", "three", "rows"], init_lora_weights=False)
    graph = peft_fx.apply(peft_fx.capture(Convolutions().eval(), x), config, "a")
    graph = peft_fx.apply(graph, config, "b")
    more = {"svd_rank": 4} if kind != "cat" else {}
    graph = peft_fx.combine(
        graph, ["a", "b"], [1.0, 0.5], "c", kind, **more, **({"density": 1.0} if "ties" in kind else {})
    )
    if kind != "ties_svd":
        assert_sum(graph, "c", [1.0, 0.5])
    assert torch.isfinite(peft_fx.set_adapter(graph, "c")(*x))


@pytest.mark.parametrize("config", [{"peft_type": "LOHA", "r": 2}, {"peft_type": "OFT", "oft_block_size": 4}, {"peft_type": "IA3", "feedforward_modules": []}],
                         ids=lambda c: c["peft_type"])  # fmt: skip
@pytest.mark.slow
def test_updates_of_any_method(config):
    torch.manual_seed(0)
    graph = peft_fx.capture(model_of("tied_llama"), kwargs=inputs("tied_llama"))
    graph = peft_fx.apply(graph, {**config, "target_modules": ["q_proj"]}, "a")
    graph = peft_fx.apply(graph, peft_fx.LoraConfig(**{**LORA, "target_modules": ["q_proj"]}), "b")
    with torch.no_grad():
        for p in graph.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    new = peft_fx.combine(graph, ["a", "b"], [1.0, 0.3], "c", "svd", svd_rank=16)
    assert_sum(new, "c", [1.0, 0.3])


@pytest.mark.slow
def test_the_face_has_it_too(tmp_path):
    reference, _ = pair(tmp_path)
    model = peft_fx.PeftModel.from_pretrained(model_of("tied_llama"), tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    for m in (reference, model):
        m.add_weighted_adapter(["a", "b"], [0.6, 0.4], "c", "cat")
        m.set_adapter("c")
    torch.testing.assert_close(output(model), output(reference.eval()))


def test_weighted_ia3_adapters_are_pefts():
    make = misuse.two_of("IA3", {"target_modules": ["q", "head"]}, feedforward_modules=["q"], init_ia3_weights=False)
    models = make(peft), make(peft_fx)
    for name in ("default", "other"):
        numbers = peft.get_peft_model_state_dict(models[0], adapter_name=name)
        peft_fx.set_peft_model_state_dict(models[1], numbers, adapter_name=name)
    for model in models:
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "new")
        model.set_adapter("new")
    torch.testing.assert_close(*map(misuse.output, models))
    first, second = (set(m.peft_config["new"].target_modules) for m in models)
    assert first == second == {"q", "v", "head"}


def test_clamped(tmp_path):
    reference, graph = pair(tmp_path)
    reference.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "svd", svd_clamp=0.9)
    reference.set_adapter("c")
    new = peft_fx.combine(graph, ["a", "b"], [1.0, 1.0], "c", "svd", svd_clamp=0.9)
    torch.testing.assert_close(output(peft_fx.set_adapter(new, "c")), output(reference.eval()), atol=1e-2, rtol=1e-2)


def test_refusals(tmp_path):
    _, graph = pair(tmp_path, r=2)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="needs equal ranks, got"):
        peft_fx.combine(graph, ["a", "b"], [1, 1], "c", "linear")
    for wrong, message in (
        (dict(combination_type="sum"), "expected one of linear, cat"),
        (dict(combination_type="ties"), "needs density"),
        (dict(combination_type="ties", density=0.5, majority_sign_method="x"), "expected one of total, frequency"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_fx.combine(graph, ["a", "b"], [1, 1], "c", **wrong)
    with pytest.raises(ValueError, match="one weight for each adapter"):
        peft_fx.combine(graph, ["a", "b"], [1], "c", "cat")
    with pytest.raises(peft_fx.GraphError, match="there is no adapter 'z'"):
        peft_fx.combine(graph, ["a", "z"], [1, 1], "c", "cat")
    with pytest.raises(peft_fx.RecipeError, match="already"):
        peft_fx.combine(graph, ["a", "b"], [1, 1], "a", "cat")
