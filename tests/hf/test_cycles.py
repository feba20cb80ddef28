"""Merged and unmerged again and again, in half precision, through the verbs and through the face: no bit changes.

PEFT_FX_CYCLES: how often; what the tests run is the small form.
"""

import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft_fx
from peft_fx import LoraConfig, get_peft_model

CYCLES = int(os.environ.get("PEFT_FX_CYCLES", "10"))
CONFIGS = {
    "LoRA": {"peft_type": "LORA", "init_lora_weights": False},
    "DoRA": {"peft_type": "LORA", "use_dora": True, "init_lora_weights": False},
    "IA3": {"peft_type": "IA3", "feedforward_modules": [], "init_ia3_weights": False},
    "OFT": {"peft_type": "OFT", "oft_block_size": 4, "r": 0, "init_weights": False},
}
X = torch.linspace(-1, 1, 32).view(4, 8)


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).to(dtype).eval().requires_grad_(False)


def bits(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def same(before, tensors):
    return all(torch.equal(before[name], tensor) for name, tensor in tensors) and before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_of_a_model(name, dtype):
    tuned = get_peft_model(model(dtype), {**CONFIGS[name], "target_modules": ["0", "2"]}).eval()
    x = X.to(dtype)
    weights, output = bits(tuned.named_parameters()), tuned(x)
    tuned.merge_adapter()
    folded = bits(tuned.named_parameters())
    assert not same(weights, tuned.named_parameters())
    tuned.unmerge_adapter()
    for _ in range(CYCLES):
        tuned.merge_adapter()
        assert same(folded, tuned.named_parameters())
        tuned.unmerge_adapter()
        assert same(weights, tuned.named_parameters())
    assert torch.equal(tuned(x), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_of_a_graph(name, dtype):
    x = X.to(dtype)
    graph = peft_fx.apply(peft_fx.capture(model(dtype), (x,)), {**CONFIGS[name], "target_modules": ["0", "2"]})
    weights, output = bits(graph.state_dict().items()), graph(x)
    for _ in range(CYCLES):
        graph = peft_fx.unmerge(peft_fx.merge(graph))
        assert same(weights, graph.state_dict().items())
    assert torch.equal(graph(x), output)


def test_a_swap_while_merged_is_one_step(tmp_path):
    """The weights go from one merge to the other, without the base's numbers between; unmerging gives those back."""
    config = {**CONFIGS["LoRA"], "r": 2, "target_modules": ["0", "2"]}
    tuned = get_peft_model(model(torch.bfloat16), config).eval()
    weights = bits(tuned.get_base_model().named_parameters())
    get_peft_model(model(torch.bfloat16), {**config, "r": 3}).save_pretrained(tmp_path)
    tuned.merge_adapter()
    written = []
    sharing = tuned.base_model.hosts.sharing
    writing = sharing.writing
    sharing.writing = lambda tensors: written.append(len(list(tensors))) or writing(())
    tuned.base_model.hotswap(
        (LoraConfig(**{**config, "r": 3}), load_file(tmp_path / "adapter_model.safetensors")), "default"
    )
    del sharing.writing
    assert len(written) == 1
    merged = tuned(X.bfloat16())
    other = peft_fx.PeftModel.from_pretrained(model(torch.bfloat16), tmp_path).eval()
    other.merge_adapter()
    assert torch.equal(merged, other(X.bfloat16()))
    tuned.unmerge_adapter()
    assert all(
        torch.equal(weights[n], p)
        for n, p in tuned.get_base_model().named_parameters()
        if n in weights and "peft_" not in n
    )
    other.unmerge_adapter()
    assert torch.equal(tuned(X.bfloat16()), other(X.bfloat16()))
