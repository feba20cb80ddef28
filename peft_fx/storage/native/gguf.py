"""Tensors of a GGUF file as they lie in it: `packed_from_gguf`, and the layers around them.

    reader = gguf.GGUFReader("model.gguf")
    layer = GGUFLinear(packed_from_gguf(reader.get_tensor(0), torch.bfloat16))

Rows are as in the file: llama.cpp's converter has permuted those of Llama's q and k projections.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import nn

from ...errors import StorageError
from ...kernels.packed import of
from ..gguf import NAMES, packed_of
from ..packed import Packed


class FileTensor(Protocol):
    """What is read of a `gguf.ReaderTensor`."""

    name: str
    tensor_type: int
    data: object  # an array of bytes, (..., out, bytes of a row) for a quantized type


def packed_from_gguf(tensor: FileTensor, dtype: torch.dtype | None = None) -> Packed:
    """The weight (..., out, in) that a quantized tensor of a GGUF file is, over a copy of its blocks.

    dtype: of the dense weight; None: torch's default. Raises StorageError for a type that is not read.
    """
    if int(tensor.tensor_type) not in NAMES:
        raise StorageError(
            f"{tensor.name} in GGUF's type {getattr(tensor.tensor_type, 'name', tensor.tensor_type)} is not read: expected "
            f"{', '.join(NAMES.values())}; a dense tensor (F32, F16, BF16) is a parameter as it is"
        )
    return packed_of(torch.tensor(tensor.data), int(tensor.tensor_type), dtype or torch.get_default_dtype())


class GGUFLinear(nn.Linear):
    """y = x Wᵀ + bias. weight: (out, in), dense where it is read; kept as the buffer `blocks`."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.text = weight.text
        self.register_buffer("blocks", weight.tensors["blocks"])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    weight = property(lambda self: self.packed().dense())

    def packed(self) -> Packed:
        return over(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.ops.peft_fx.packed_linear(x, [self.blocks], bias, self.text)


class GGUFEmbedding(nn.Embedding):
    """W[ids]. weight: (num_embeddings, embedding_dim), dense where it is read; kept as the buffer `blocks`."""

    def __init__(self, weight: Packed):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.text = weight.text
        self.register_buffer("blocks", weight.tensors["blocks"])

    weight = property(lambda self: self.packed().dense())

    def packed(self) -> Packed:
        return over(self)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.ops.peft_fx.packed_embedding(ids, [self.blocks], self.text)


def over(layer: GGUFLinear | GGUFEmbedding) -> Packed:
    """A layer's numbers, as those of other layers are recognised."""
    return Packed(of(layer.text)[1], {"blocks": cast(torch.Tensor, layer.blocks)})
