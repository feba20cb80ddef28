"""Layers around the tensors of a GGUF file that the `gguf` package wrote."""

import numpy as np
import pytest
import torch
from packed_checks import check_place
from torch.nn import functional as F

from peft_fx.errors import StorageError
from peft_fx.storage.native.gguf import GGUFEmbedding, GGUFLinear, packed_from_gguf
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme
from peft_fx.storage.twins import twin

gguf = pytest.importorskip("gguf")


@pytest.fixture
def tensors(tmp_path):
    """Name -> tensor of a file."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, kind in (("linear", "Q4_0"), ("table", "Q8_0"), ("dense", "F32")):
        kind = gguf.GGMLQuantizationType[kind]
        W = rng.standard_normal((24, 64), dtype=np.float32)
        writer.add_tensor(name, gguf.quants.quantize(W, kind), raw_dtype=kind)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}


def dense_of(tensor):
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def test_linear_and_its_gradient(tensors):
    W, bias = dense_of(tensors["linear"]), torch.randn(24)
    layer = GGUFLinear(packed_from_gguf(tensors["linear"]), bias)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, F.linear(x, W, bias)) and (layer.out_features, layer.in_features) == (24, 64)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 24) @ W)
    packed = recognise(layer)
    assert packed.tensors["blocks"] is layer.blocks and layer.blocks.numel() == 24 * 64 // 32 * 18
    assert {*layer.state_dict()} == {"blocks", "bias"} and torch.equal(layer.weight, W)
    check_place(layer, "weight", packed, scheme("gguf").quantize(torch.randn(24, 64), packed))


def test_embedding_and_dtype(tensors):
    layer = GGUFEmbedding(packed_from_gguf(tensors["table"], torch.bfloat16))
    ids = torch.tensor([[1, 23], [0, 1]])
    assert torch.equal(layer(ids), dense_of(tensors["table"]).bfloat16()[ids])
    assert torch.equal(twin(layer)(ids), layer(ids))


def test_a_dense_tensor_is_refused(tensors):
    with pytest.raises(StorageError, match="dense in GGUF's type F32"):
        packed_from_gguf(tensors["dense"])
