"""Layers of gptqmodel and auto-gptq; the format itself is in test_handpacked.py."""

import handpacked
import packages
import pytest
import torch

from peft_fx.errors import StorageError
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

N, K = 96, 128
CLASSES = {"gptqmodel": ("GPTQQuantLinear", "TorchLinear"), "auto_gptq": ("QuantLinear",)}


def gptqmodel(monkeypatch, hand, classes=CLASSES["gptqmodel"], version=1, **more):
    about = {"bits": hand.facts["bits"], "in_features": K, "out_features": N, "qzero_format": lambda: version}
    return packages.layer(monkeypatch, "gptqmodel.nn_modules.qlinear.torch", classes, hand.tensors, **about | more)


def auto_gptq(monkeypatch, hand, file):
    about = {"bits": hand.facts["bits"], "infeatures": K, "outfeatures": N, "group_size": 32}
    return packages.layer(
        monkeypatch, f"auto_gptq.nn_modules.qlinear.{file}", CLASSES["auto_gptq"], hand.tensors, **about
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_layer_of_gptqmodel(monkeypatch, bits, version):
    hand = handpacked.gptq(N, K, bits=bits, version=version, order=True)
    module = gptqmodel(monkeypatch, hand, version=version)
    held = recognise(module)
    assert held.format.facts == hand.facts and held.dtype == torch.float16
    assert torch.equal(held.dense(), hand.W.half())
    assert all(held.tensors[name] is module._buffers[name] for name in hand.tensors)
    assert recognise(module, "bias") is None


@pytest.mark.parametrize("file, plus", [("qlinear_cuda_old", "wrap"), ("qlinear_cuda", "whole")])
def test_a_layer_of_auto_gptq(monkeypatch, file, plus):
    hand = handpacked.gptq(N, K)
    held = recognise(auto_gptq(monkeypatch, hand, file))
    assert held.format["plus"] == plus and torch.equal(held.dense(), hand.W.half())


def test_a_layer_of_auto_gptq_that_knows_no_order(monkeypatch):
    """`qlinear_cuda_old` multiplies the groups as they lie."""
    hand, turned = handpacked.gptq(N, K), handpacked.gptq(N, K, order=True)
    hand.tensors["g_idx"] = turned.tensors["g_idx"]
    assert torch.equal(recognise(auto_gptq(monkeypatch, hand, "qlinear_cuda_old")).dense(), hand.W.half())


@pytest.mark.parametrize("change, said", [
    ({"linear_mode": "inference"}, "has repacked its weight"),
    ({"classes": ("GPTQQuantLinear", "MarlinLinear")}, "a MarlinLinear keeps its weight in its kernel's order"),
    ({"bits": 5}, "of 5 bits"),
])  # fmt: skip
def test_a_layer_of_gptqmodel_that_cannot_be_read(monkeypatch, change, said):
    with pytest.raises(StorageError, match=said):
        recognise(gptqmodel(monkeypatch, handpacked.gptq(N, K), **change))


def test_words_of_another_type_are_repacked(monkeypatch):
    hand = handpacked.gptq(N, K)
    hand.tensors["qweight"] = hand.tensors["qweight"].to(torch.uint8)
    with pytest.raises(StorageError, match="has repacked its weight"):
        recognise(gptqmodel(monkeypatch, hand))


def test_a_kernel_of_auto_gptq_that_cannot_be_read(monkeypatch):
    with pytest.raises(StorageError, match="qlinear_exllama keeps its weight in an order of its own.*disable_exllama"):
        recognise(auto_gptq(monkeypatch, handpacked.gptq(N, K), "qlinear_exllama"))


def test_placed_numbers_come_back_and_a_kept_dense_weight_is_forgotten(monkeypatch):
    forgotten = []
    module = gptqmodel(monkeypatch, handpacked.gptq(N, K), clear_weight_cache=lambda: forgotten.append(1))
    before, held, storage = dict(module._buffers), recognise(module), scheme("gptq")
    undo = storage.place(module, "weight", held.again(storage.quantize(held.dense() * 0.5, held)))
    assert not torch.equal(recognise(module).dense(), held.dense()) and len(forgotten) == 1
    undo()
    assert all(module._buffers[name] is t for name, t in before.items()) and len(forgotten) == 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_the_package_itself(bits, order):
    """Random words: all codes, all zero points, both versions of the format."""
    kernel = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    convert = pytest.importorskip("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module
    module = kernel(
        bits=bits,
        group_size=32,
        sym=False,
        desc_act=order,
        in_features=K,
        out_features=N,
        bias=True,
        register_buffers=True,
    )
    for words in (module.qweight, module.qzeros):
        words.random_(-(2**31), 2**31)
    module.scales.uniform_(0.005, 0.02)
    if order:
        module.g_idx = module.g_idx[torch.randperm(K)].contiguous()
    module.train()
    module.qzero_format(1)
    first = recognise(module)
    first = first.again({name: t.clone() for name, t in first.tensors.items()}).dense()
    convert(module, bits=bits, pack_dtype=torch.int32)
    module.qzero_format(2)
    W = module.dequantize_weight().t()
    assert torch.equal(first, W) and torch.equal(recognise(module).dense(), W)
