"""Methods on the experts of a model: dropout, merge, files and AdaLoRA's budget; and on the weights of MultiheadAttention."""

import conformance as c
import pytest
import torch
from torch.func import functional_call

import peft_fx as fx
from methods import MODULES
from peft_fx.store.state import state_of
from peft_fx.store.tensors import get_tensor
from peft_fx.training.adalora import RankAllocator, orthogonality

EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
P = 0.4
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 2}
# options, the field of the dropout
CASES = [
    ({"peft_type": "LORA", "r": 3}, "lora_dropout"),
    ({"peft_type": "LORA", "r": 3, "use_dora": True}, "lora_dropout"),
    (ADALORA, "lora_dropout"),
    ({"peft_type": "HIRA", "r": 3}, "hira_dropout"),
    ({"peft_type": "GRALORA", "r": 4, "hybrid_r": 2}, "gralora_dropout"),
    ({"peft_type": "LOHA", "r": 3}, "rank_dropout"),
    ({"peft_type": "LOKR", "r": 3}, "module_dropout"),
]
METHODS = pytest.mark.parametrize(
    ("options", "field"), CASES, ids=[o["peft_type"] + "-dora" * ("use_dora" in o) for o, _ in CASES]
)


def gradients(tuned) -> dict[str, torch.Tensor]:
    tuned.zero_grad()
    c.loss(c.floats(tuned(**c.inputs("mixtral")))).backward()
    return {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}


@METHODS
def test_a_model_s_experts_are_adapted_merged_and_filed(options, field, tmp_path):
    tuned = fx.apply(c.captured("mixtral"), options | EXPERTS)
    assert c.error(c.run(tuned, "mixtral"), c.run(c.captured("mixtral"), "mixtral")) <= 1e-5
    c.randomise(tuned)
    expected = c.run(tuned, "mixtral")
    assert c.error(c.run(fx.merge(tuned), "mixtral"), expected) <= 1e-5
    fx.save_adapter(tuned, tmp_path)
    assert c.error(c.run(fx.load_adapter(c.captured("mixtral"), tmp_path), "mixtral"), expected) == 0
    assert all(g is not None and g.isfinite().all() for g in gradients(tuned).values())


@METHODS
def test_dropout_on_experts_acts_while_training_only(options, field):
    tuned = fx.apply(c.captured("mixtral"), options | EXPERTS | {field: P})
    c.randomise(tuned)
    expected = c.run(tuned, "mixtral")
    assert c.error(c.run(fx.merge(tuned), "mixtral"), expected) <= 1e-5
    tuned.train()
    torch.manual_seed(0)
    first = c.run(tuned, "mixtral")
    torch.manual_seed(0)
    assert all(map(torch.equal, c.run(tuned, "mixtral"), first))
    found = [c.run(tuned, "mixtral") for _ in range(4)]
    assert max(c.error(output, expected) for output in found) > 1e-3
    assert all(g is not None and g.isfinite().all() for g in gradients(tuned).values())
    tuned.eval()
    assert all(map(torch.equal, c.run(tuned, "mixtral"), expected))


def test_adalora_s_budget_keeps_the_same_components_of_all_experts(tmp_path):
    tuned = fx.apply(c.captured("mixtral"), ADALORA | EXPERTS)
    c.randomise(tuned)
    allocator = RankAllocator(tuned)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 1e-3)
    components = 4 * len(allocator.tensors)
    assert (allocator.first_budget, allocator.last_budget) == (components, components // 2)
    assert orthogonality(tuned).item() > 0
    for step in range(10):
        gradients(tuned)
        optimizer.step()
        allocator.update_and_allocate(step)
    assert sum(map(sum, allocator.rank_pattern.values())) == components // 2
    allocator.save(tmp_path)
    again = fx.load_adapter(c.captured("mixtral"), tmp_path)
    assert c.error(c.run(again, "mixtral"), c.run(tuned, "mixtral")) <= 1e-5


@pytest.mark.parametrize("subject", ["attention", "attention_cross"])
@pytest.mark.parametrize(
    "options",
    [{"peft_type": "LORA", "r": 2, "use_dora": True}, {"peft_type": "HIRA", "r": 3}, {"peft_type": "LOHA", "r": 3}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_multihead_attention_has_the_definition_s_weights(options, subject):
    tuned = fx.apply(c.captured(subject), options | {"target_modules": ["attn"]})
    c.randomise(tuned)
    model = c.build(subject).double()
    weights, found = dict(model.named_parameters()), state_of(tuned).recipe["default"].placements
    for p in found:
        tensors = {
            spec.key: get_tensor(tuned, f"peft_fx.adapters.{p.resolve(name).name}").double().detach()
            for name, spec in p.tensors.items()
            if spec.key
        }
        weights[p.target.name], _ = MODULES[p.method].definition(weights[p.target.name], None, tensors, options)
    assert {p.target.name for p in found} == {"attn.in_proj_weight", "attn.out_proj.weight"}
    with torch.no_grad():
        expected = c.floats(functional_call(model, weights, kwargs=c.inputs(subject, torch.float64)))
    assert c.error(c.run(tuned, subject), expected) <= 1e-5
