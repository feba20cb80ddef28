"""AdaLoRA's rank budget, step by step beside PEFT's, and what remains of it in files."""

import conformance as c
import peft
import pytest
import torch
from safetensors.torch import load_file

import peft_fx as fx
from peft_fx.training.adalora import RankAllocator, orthogonality

OPTIONS = {
    "peft_type": "ADALORA", "target_modules": ["q_proj", "down_proj"], "init_r": 4, "target_r": 2, "total_step": 8, "tinit": 1,
    "tfinal": 2,
}  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    theirs = c.peft_model("llama", OPTIONS)
    folder = c.save_peft(theirs, tmp_path / "start")
    return theirs, fx.load_adapter(c.captured("llama"), folder, trainable=True)


def trained(model, allocate):
    """Ten steps of SGD."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for step in range(10):
        optimizer.zero_grad()
        c.loss(c.floats(model(**c.inputs("llama")))).backward()
        optimizer.step()
        allocate(step)


def test_the_budget_keeps_the_components_that_peft_keeps(pair, tmp_path):
    theirs, tuned = pair
    allocator = RankAllocator(tuned)
    trained(theirs, theirs.base_model.update_and_allocate)
    trained(tuned, allocator.update_and_allocate)
    expected = c.saved(lambda f: c.save_peft(theirs, f))
    allocator.save(tmp_path / "end")
    found = load_file(tmp_path / "end" / "adapter_model.safetensors")
    assert allocator.rank_pattern == theirs.peft_config["default"].rank_pattern
    assert not all(all(kept) for kept in allocator.rank_pattern.values())
    assert c.error(found, expected) <= 1e-5
    again = fx.load_adapter(c.captured("llama"), tmp_path / "end")
    assert c.error(c.run(again, "llama"), c.run(tuned, "llama")) <= 1e-5
    reloaded = c.quiet(peft.PeftModel.from_pretrained, c.build("llama"), tmp_path / "end").eval()
    assert c.error(c.run(reloaded, "llama"), c.run(tuned, "llama")) <= 1e-5


def test_orthogonality_is_the_mean_distance_of_the_gram_matrices_from_one(pair):
    theirs, tuned = pair
    distances = [
        torch.linalg.norm((p @ p.T if "lora_A" in n else p.T @ p) - torch.eye(4))
        for n, p in theirs.named_parameters()
        if "lora_A" in n or "lora_B" in n
    ]
    assert torch.allclose(orthogonality(tuned), 0.5 * sum(distances) / len(distances))


@pytest.mark.parametrize("subject", ["wide", "wide_conv2d"])
def test_a_target_of_which_nothing_is_kept_stays_as_it_is(subject, tmp_path):
    options = {**OPTIONS, "target_modules": ["layer"], "rank_pattern": {"layer.lora_E": [False] * 4}}
    tuned = fx.apply(c.captured(subject), options)
    assert c.error(c.run(tuned, subject), c.run(c.build(subject), subject)) == 0
    fx.save_adapter(tuned, tmp_path)
    assert c.error(c.run(fx.merge(fx.load_adapter(c.captured(subject), tmp_path)), subject), c.run(tuned, subject)) == 0


def test_a_budget_needs_an_adalora_adapter():
    with pytest.raises(fx.RecipeError, match="only AdaLoRA"):
        RankAllocator(fx.apply(c.captured("wide"), {"peft_type": "LORA", "target_modules": ["layer"]}))
