"""layer_replication: PEFT's outputs and gradients, and a merge that is right where PEFT's is not."""

import copy

import peft
import pytest
import tiny
import torch
from marks import quick

import peft_fx

RANGES = [[0, 2], [1, 2], [0, 1]]  # layers 0 1 1 0
CASES = {"llama": ["q_proj", "down_proj"], "bert": ["query", "intermediate.dense"]}


@pytest.fixture(scope="module", params=quick(CASES, "llama"))
def case(request, tmp_path_factory):
    model = tiny.build(request.param).eval()
    config = peft.LoraConfig(
        r=4, target_modules=CASES[request.param], layer_replication=RANGES, init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    folder = tmp_path_factory.mktemp("replicated")
    theirs.save_pretrained(folder)
    graph = peft_fx.capture(model)
    ids = torch.randint(0, model.config.vocab_size, (3, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, theirs, graph, folder, inputs


def run(model, inputs):
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def test_outputs_and_gradients_equal_pefts(case):
    _, theirs, graph, folder, inputs = case
    tuned = peft_fx.load_adapter(graph, folder, trainable=True)
    ours, expected = run(tuned, inputs), run(theirs, inputs)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours.square().sum().backward()
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    expected.square().sum().backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora_" in n}

    state = tuned.meta["peft_fx"]
    for placement in state.recipe["default"].placements:
        for name, key, _ in placement.saved():
            gradient = tuned.get_parameter(f"peft_fx.adapters.{placement.state_name(name)}").grad
            assert torch.allclose(gradient, gradients[key], rtol=1e-4, atol=1e-5 * gradients[key].abs().max())


def test_copies_share_base_weights_and_own_their_adapters(case):
    model, _, graph, folder, _ = case
    tuned = peft_fx.load_adapter(graph, folder)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for n, p in tuned.named_parameters() if not n.startswith("peft_fx.")} <= pointers
    adapters = [p for n, p in tuned.named_parameters() if n.startswith("peft_fx.")]
    assert len({p.data_ptr() for p in adapters}) == len(adapters) == 2 * 2 * 4


def test_merge_needs_untie_and_is_then_right(case):
    _, _, graph, folder, inputs = case
    tuned = peft_fx.load_adapter(graph, folder)
    with pytest.raises(peft_fx.MergeError, match="untie=True"):
        peft_fx.merge(tuned)
    merged = peft_fx.merge(tuned, untie=True)
    expected = run(tuned, inputs)
    assert (run(merged, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(run(peft_fx.unmerge(merged), inputs), expected)


@pytest.mark.slow
def test_a_replicated_graph_survives_export_and_load(case, tmp_path):
    _, _, graph, folder, inputs = case
    tuned = peft_fx.load_adapter(graph, folder)
    peft_fx.export(tuned, tmp_path / "deeper.pt2")
    loaded = peft_fx.load(tmp_path / "deeper.pt2")
    assert torch.equal(run(loaded, inputs), run(tuned, inputs))


@pytest.mark.parametrize("ranges, reason", [([[0, 3]], "2 layers"), ([[1, 1]], "range"), ([[-1, 1]], "range")])
def test_ranges_outside_the_model_are_refused(case, ranges, reason):
    graph = case[2]
    with pytest.raises(peft_fx.RecipeError, match=reason):
        peft_fx.apply(graph, peft_fx.LoraConfig(target_modules=["q_proj", "query"], layer_replication=ranges))


def test_a_model_without_a_list_of_layers_is_refused():
    graph = peft_fx.capture(torch.nn.Sequential(torch.nn.Linear(4, 4)), args=(torch.randn(2, 4),))
    with pytest.raises(peft_fx.RecipeError, match="list of layers"):
        peft_fx.apply(graph, peft_fx.LoraConfig(target_modules=["0"], layer_replication=[[0, 1]]))
