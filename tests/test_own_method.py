"""A user's method, the one in docs/own-method.md, goes everywhere that the package's own methods go."""

import copy
import re
import types
from pathlib import Path

import conformance as c
import pytest
import torch

import peft_fx as fx
from peft_fx.methods import METHODS, get_config
from peft_fx.methods.base import OutputMap, Rewrite, Tensor
from peft_fx.methods.lora import LoRA
from peft_fx.store.tensors import get_tensor

PAGE = Path(__file__).resolve().parent.parent / "docs" / "own-method.md"
RECIPE = {"peft_type": "LORA_XS", "r": 2, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def page():
    """The page's first block of code, run as a module."""
    module = types.ModuleType("own_method")
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], module.__dict__)
    return module


def adapted(seed=3):
    tuned = fx.apply(c.captured("llama"), RECIPE)
    c.randomise(tuned, seed)
    return tuned


def ones(tensor, W):
    tensor.fill_(1.0)


def scale(name="SCALE", factor=1.0):
    @fx.method(name)
    class Scale(OutputMap):
        start: float = 1.0

        def tensors(self, target, config):
            return {"g": Tensor((target.out_features,), ones, key="g")}

        def map_output(self, y, theta, target, config):
            return y * theta["g"] * config.start * factor

    return Scale


def test_it_starts_as_the_identity_and_trains(page):
    tuned = fx.apply(c.captured("llama"), RECIPE)
    assert c.error(c.run(tuned, "llama"), c.run(c.captured("llama"), "llama")) <= 1e-6
    optimiser = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        losses.append(c.floats(tuned(**c.inputs("llama")))[0].square().mean())
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == 2 * 2 * 2 * 2


def test_its_formula_is_what_the_graph_computes_and_merges(page):
    tuned = adapted()
    model = c.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
                path = next(n for n, m in model.named_modules() if m is module)
                R = get_tensor(tuned, f"peft_fx.adapters.default.{path}.on_weight.R")
                U, S, Vh = torch.linalg.svd(module.weight, full_matrices=False)
                module.weight += (U * S)[:, :2] @ R @ Vh[:2]
    expected = c.run(model, "llama")
    assert c.error(c.run(tuned, "llama"), expected) <= 1e-5
    merged = fx.merge(tuned)
    assert c.error(c.run(merged, "llama"), expected) <= 1e-5
    back = fx.unmerge(merged)
    assert all(torch.equal(a, b) for a, b in zip(c.run(back, "llama"), c.run(tuned, "llama"), strict=True))


def test_it_is_saved_loaded_and_swapped(page, tmp_path):
    tuned, other = adapted(), adapted(seed=8)
    fx.save_adapter(other, tmp_path)
    loaded = fx.load_adapter(c.captured("llama"), tmp_path)
    assert c.error(c.run(loaded, "llama"), c.run(other, "llama")) == 0
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    c.run(compiled, "llama")
    with torch.compiler.set_stance("fail_on_recompile"):
        fx.hotswap(compiled, tmp_path)
        assert c.error(c.run(compiled, "llama"), c.run(other, "llama")) <= 1e-6


@pytest.mark.slow
def test_it_is_exported_and_loaded_adapted_and_merged(page, tmp_path):
    tuned = adapted()
    for graph in (tuned, fx.merge(tuned)):
        fx.export(graph, tmp_path / "graph.pt2")
        loaded = fx.load(tmp_path / "graph.pt2")
        assert c.error(c.run(loaded, "llama"), c.run(tuned, "llama")) <= 1e-5
    assert c.error(c.run(copy.deepcopy(tuned), "llama"), c.run(tuned, "llama")) == 0


def test_its_check_and_its_fields_are_enforced(page):
    with pytest.raises(fx.RecipeError, match="defined on matrices, this weight is"):
        fx.apply(c.captured("llama"), {**RECIPE, "target_modules": ["input_layernorm"]})
    with pytest.raises(fx.RecipeError, match="r: expected int, got 'two'"):
        fx.apply(c.captured("llama"), {**RECIPE, "r": "two"})
    with pytest.raises(fx.RecipeError, match="unknown config field 'rank' = 3"):
        fx.apply(c.captured("llama"), {**RECIPE, "rank": 3})


def test_a_nested_config_may_check_its_values():
    @fx.method("CHECKED")
    class Checked(Rewrite):
        class Config(fx.AdapterConfig):
            limit: int = 1

            def __post_init__(self):
                super().__post_init__()
                if self.limit > 2:
                    raise fx.RecipeError(f"limit={self.limit}: at most 2")

    assert get_config("checked")(limit=2).to_dict()["peft_type"] == "CHECKED"
    with pytest.raises(fx.RecipeError, match="at most 2"):
        get_config("CHECKED").from_dict({"limit": 3})


def test_a_method_can_be_built_on_one_of_the_package_s():
    @fx.method("HALF_LORA")
    class HalfLoRA(LoRA):
        share: float = 0.5

        def scaling(self, target, config):
            return config.share * super().scaling(target, config)

    base, recipe, results = c.captured("wide"), {"target_modules": ["layer"], "r": 2, "init_lora_weights": False}, []
    for more in ({"peft_type": "LORA"}, {"peft_type": "HALF_LORA"}, {"peft_type": "HALF_LORA", "share": 1.0}):
        torch.manual_seed(0)
        results.append(c.run(fx.apply(base, recipe | more), "wide"))
    whole, half, same = results
    assert c.error(same, whole) == 0 and c.error(half, whole) > 1e-3


def test_a_name_registered_again_means_the_new_formula():
    results = []
    for factor in (1.0, 3.0):
        scale(factor=factor)
        results.append(c.run(fx.apply(c.captured("wide"), {"peft_type": "SCALE", "target_modules": ["layer"]}), "wide"))
    assert c.error(results[1], [3 * t for t in results[0]]) <= 1e-6


def without_default():
    @fx.method("OPEN")
    class Open(Rewrite):
        size: int


WRONG = {
    "LORA is a method of this package": lambda: scale("lora"),
    "SAVED is a method of this package": lambda: scale("SAVED"),
    "a method's name is an identifier, got 'a.b'": lambda: scale("a.b"),
    "derives from none of the shapes": lambda: fx.method("NONE")(dict),
    "config field 'size' has no default": without_default,
}


@pytest.mark.parametrize("says", WRONG)
def test_what_cannot_be_registered_is_refused_with_the_reason(says):
    before = dict(METHODS)
    with pytest.raises(fx.RecipeError, match=re.escape(says)):
        WRONG[says]()
    assert before == METHODS


def test_a_method_that_is_not_registered_is_unknown():
    with pytest.raises(fx.RecipeError, match="peft_type 'LORA_XS' is unknown"):
        fx.apply(c.captured("llama"), RECIPE)
