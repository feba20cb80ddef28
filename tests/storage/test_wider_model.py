"""A layer whose numbers are made in half precision, in a model that computes in float32: GPTQ's float16 scales on a CPU."""

import handpacked
import pytest
import torch
from torch import nn

import peft_fx as fx
from peft_fx.storage.native.gptq import GPTQLinear

N, K = 64, 64
METHODS = {
    "LORA": {"init_lora_weights": False, "lora_bias": True},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 4, "init_weights": False},
}


def model(*, dense=False):
    torch.manual_seed(0)
    layer = GPTQLinear(K, N, True, bits=4, group=32)
    for name, tensor in handpacked.gptq(N, K).tensors.items():
        getattr(layer, name).copy_(tensor)
    bias = torch.randn(N)
    if dense:
        W = layer.packed().dense()
        assert W.dtype == torch.float16
        layer = nn.Linear(K, N)
        layer.weight.data = W.float()
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return nn.Sequential(layer).eval()


@pytest.mark.parametrize("form", ["activation", "weight"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_act_in_float32(method, form, tmp_path):
    x = torch.randn(3, K)
    torch.manual_seed(1)
    config = {"peft_type": method, "target_modules": ["0"], **METHODS[method]}
    tuned = fx.apply(fx.capture(model(), (x,)), config, lowering=form)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    fx.save_adapter(tuned, tmp_path)
    expected = fx.load_adapter(fx.capture(model(dense=True), (x,)), tmp_path)(x).detach()
    rounded = 2 * torch.finfo(torch.float16).eps * float(expected.abs().max())  # a rewritten weight keeps its dtype
    torch.testing.assert_close(tuned(x), expected, rtol=0, atol=1e-5 if form == "activation" else rounded)
    merged = fx.merge(tuned, storage="dense")
    kept = {name: merged.get_parameter(f"0.{name}").dtype for name in ("weight", "bias")}
    assert kept == {"weight": torch.float16, "bias": torch.float32}
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=rounded)
    torch.testing.assert_close(fx.PeftModel.from_pretrained(model(), tmp_path)(x), expected, rtol=0, atol=rounded)
