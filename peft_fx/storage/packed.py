"""`Packed`: the module that stands where a parameter would, and how it is found."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels.packed import of
from .formats import Format

SUFFIX = "_packed"  # of the child that stands for a parameter; the parameter's own name means the dense weight


def weight_name(tensor: str) -> str:
    """The parameter that a tensor belongs to: of `q_proj.weight_packed.absmax` it is `q_proj.weight`; of any other, itself."""
    path, _, _ = tensor.rpartition(".")
    return path.removesuffix(SUFFIX) if path.endswith(SUFFIX) else tensor


class Packed(nn.Module):
    """Buffers with the packed numbers, and their format. Called, it gives the dense weight.

    text: the format's; Dynamo reads it, and could not make it. evaluation: the text in eval mode, where a scheme's product is
    another one then.
    """

    def __init__(
        self, format: Format, tensors: dict[str, torch.Tensor], *, evaluation: str = "", persistent: bool = True
    ):
        super().__init__()
        self.text, self.evaluation = format.text, evaluation
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent)

    @property
    def format(self) -> Format:
        return of(self.text)[1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.named_buffers(recurse=False, remove_duplicate=False))

    def named(self, parameter: str) -> dict[str, torch.Tensor]:
        """The tensors under their full names, those of a parameter of that name."""
        return {f"{parameter}{SUFFIX}.{name}": tensor for name, tensor in self.tensors.items()}

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.format.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.format.dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def forward(self, training: bool) -> torch.Tensor:
        text = self.text if training or not self.evaluation else self.evaluation
        return torch.ops.peft_fx.dequantize.default(list(self._buffers.values()), text)

    def dense(self) -> torch.Tensor:
        """The weight's numbers."""
        with torch.no_grad():
            return torch.ops.peft_fx.dequantize(list(self._buffers.values()), self.text)

    def again(self, tensors: dict[str, torch.Tensor] | None = None, *, persistent: bool = True) -> Packed:
        """Another module over the same tensors, or over others in the same format."""
        return Packed(self.format, tensors or self.tensors, evaluation=self.evaluation, persistent=persistent)

    def extra_repr(self) -> str:
        return self.text
