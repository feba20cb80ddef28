"""`reserve` on a PeftModel: what changes at run time is data, and no compiled call compiles again."""

import peft
import pytest
import torch
from torch import nn

import peft_fx
from peft_fx import LoraConfig, get_peft_model

CONFIG = {"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False}
X = torch.linspace(-1, 1, 24).view(3, 8)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()


def two(**options):
    model = get_peft_model(base(), LoraConfig(**CONFIG, **options), "a")
    model.add_adapter("b", LoraConfig(**CONFIG, **options))
    return model.eval()


def outputs(model):
    found = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        found[name] = model(X).detach()
    with model.disable_adapter():
        found["none"] = model(X).detach()
    return found


def counted(model):
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda gm, _: (graphs.append(1), gm.forward)[1])
    return compiled, graphs


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


def test_nothing_compiles_again_whatever_is_set_disabled_merged_loaded_or_deleted(tmp_path):
    model = two()
    alone = outputs(model)
    model.save_pretrained(tmp_path)
    model.reserve(slots=3, max_rank=4)
    assert model.active_adapters == ["b"] and list(model.peft_config) == ["a", "b"]
    compiled, graphs = counted(model)
    assert close(compiled(X), alone["b"])
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(20):
            model.set_adapter("a")
            assert close(compiled(X), alone["a"])
            with model.disable_adapter():
                assert close(compiled(X), alone["none"])
            model.merge_adapter()
            assert close(compiled(X), alone["a"])
            model.unmerge_adapter()
            model.load_adapter(tmp_path / "b", "c")
            model.set_adapter("c")
            assert close(compiled(X), alone["b"])
            model.set_adapter("a")
            model.delete_adapter("c")
            assert list(model.peft_config) == ["a", "b"]
    assert len(graphs) == 1


def test_without_slots_each_state_is_compiled_once():
    model = two()
    compiled, graphs = counted(model)
    for _ in range(20):
        model.set_adapter("a")
        compiled(X)
        with model.disable_adapter():
            compiled(X)
        model.merge_adapter()
        compiled(X)
        model.unmerge_adapter()
    assert len(graphs) == 2  # with the adapter, and without: merged, or disabled


def test_a_slot_is_saved_and_read_by_peft_as_its_adapter(tmp_path):
    model = two()
    alone = outputs(model)
    model.reserve(slots=3, max_rank=6)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(X), alone["a"])
    assert not (tmp_path / "slot0").exists()


def test_a_graph_of_it_has_the_same_slots(tmp_path):
    model = two()
    alone = outputs(model)
    model.reserve(slots=3)
    model.set_adapter("a")
    graph = model.to_graph((X,))
    assert close(graph(X), alone["a"]) and [s.name for s in peft_fx.slots(graph)] == ["a", "b", None]
    peft_fx.switch(graph, "b")
    assert close(graph(X), alone["b"])


def test_gradients_go_to_what_acts():
    model = two()
    model.reserve(slots=2)
    model.set_adapter("a")
    model(X).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(bool(g.any()) == (".a." in n) for n, g in grads.items() if "lora_B" in n) and grads


REFUSED = {
    "too few slots": (lambda m, f: m.reserve(slots=1), peft_fx.GraphError, "slots=1"),
    "twice": (lambda m, f: (m.reserve(slots=2), m.reserve(slots=3)), peft_fx.GraphError, "it has slots already"),
    "full": (lambda m, f: (m.reserve(slots=2), m.load_adapter(f / "a", "c")), peft_fx.HotswapError, "no slot is free"),
    "a larger rank": (
        lambda m, f: (m.reserve(slots=3), m.add_adapter("c", LoraConfig(**{**CONFIG, "r": 5}))), peft_fx.HotswapError, "rank|shape|larger",
    ),
    "another method": (
        lambda m, f: (m.reserve(slots=3), m.add_adapter("c", LoraConfig(**CONFIG, use_dora=True))), ValueError, "c",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(row, tmp_path):
    model = two()
    alone = outputs(model)
    model.save_pretrained(tmp_path)
    change, kind, text = REFUSED[row]
    with pytest.raises(kind, match=text):
        change(model, tmp_path)
    assert list(model.peft_config) == ["a", "b"]
    again = outputs(model)
    assert all(close(again[n], alone[n]) for n in alone)
