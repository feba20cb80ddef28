"""Tensors of a GGUF file as they lie in it: `packed_from_gguf`, and the layers around them.

    reader = gguf.GGUFReader("model.gguf")
    layer = GGUFLinear(packed_from_gguf(reader.get_tensor(0), torch.bfloat16))

Rows are as in the file: llama.cpp's converter has permuted those of Llama's q and k projections.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from ...errors import StorageError
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


class GGUFLinear(nn.Module):
    """y = x Wᵀ + bias. weight: (out, in)."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight_packed = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, bias = self.weight_packed, None if self.bias is None else self.bias.to(x.dtype)
        return torch.ops.peft_fx.packed_linear(x, list(own._buffers.values()), bias, own.text)


class GGUFEmbedding(nn.Module):
    """W[ids]. weight: (num_embeddings, embedding_dim)."""

    def __init__(self, weight: Packed):
        super().__init__()
        self.weight_packed = weight
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        own = self.weight_packed
        return torch.ops.peft_fx.packed_embedding(ids, list(own._buffers.values()), own.text)
