"""`NativeLinear`: a linear layer over packed numbers, whose state dict is what a checkpoint of its scheme has."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import nn

from ...errors import StorageError
from ...kernels.packed import of
from ..formats import Format
from ..packed import Packed

Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class NativeLinear(nn.Module):
    """y = x Wᵀ + bias; gradients to x and to the bias. The packed numbers are buffers with the checkpoint's names and types.

    scheme: the storage's name. method: what `quant_method` in a checkpoint's config says. packages: what transformers' own loader
    for it imports. optional: buffers that not all checkpoints have; `usual` makes them, and no state dict has them then.
    mark: the tensor that each layer of a checkpoint has. output_stays: the output layer is dense, beside what `skipped` says.
    moved_by_package: transformers imports the package to move a model that says its `quant_method`.
    sizes: name -> (shape, type) of the buffers.
    """

    scheme = method = ""
    mark = "qweight"
    output_stays = moved_by_package = False
    packages: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    text: str

    def __init__(self, in_features: int, out_features: int, bias: bool, sizes: Sizes):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.sizes = sizes
        for name, (shape, dtype) in sizes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_load_state_dict_post_hook(after_load)

    # what a scheme says

    @classmethod
    def elsewhere(cls) -> bool:
        """Whether transformers' own loader reads such checkpoints here."""
        return all(installed(package) for package in cls.packages)

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """Raises StorageError for a checkpoint's `quantization_config` that this layer cannot read."""

    @classmethod
    def kind(cls, stored: set[str]) -> type[NativeLinear]:
        """The class for a checkpoint with tensors of these names, where one config stands for several.

        Raises StorageError if none reads it.
        """
        return cls

    @classmethod
    def skipped(cls, config: dict[str, Any]) -> list[str] | None:
        """Names or patterns of linear layers that stay dense, as the config has them; None: none are said."""
        return config.get("modules_to_not_convert")

    @classmethod
    def like(
        cls, path: str, in_features: int, out_features: int, bias: bool, config: dict[str, Any]
    ) -> NativeLinear | None:
        """The layer in the place of the linear layer at `path`; None where the config leaves it dense."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Of the format."""
        return {}

    def numbers(self) -> dict[str, torch.Tensor]:
        """The tensors in the scheme's order."""
        return {name: self.tensor(name) for name in self.sizes}

    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.tensor("scales").dtype

    def usual(self, name: str) -> torch.Tensor:
        """An optional buffer, for a checkpoint without it."""
        raise NotImplementedError

    # what is the same for all

    def tensor(self, name: str) -> torch.Tensor:
        """A buffer."""
        found = self._buffers[name]
        assert found is not None
        return found

    def leave_out(self, name: str) -> None:
        """An optional buffer that the checkpoint does not have."""
        self._non_persistent_buffers_set.add(name)

    def loaded(self) -> None:
        """Called when a checkpoint's tensors have been put in."""
        for name in self._non_persistent_buffers_set:
            self._buffers[name] = self.usual(name)
        self.settle()

    def settle(self) -> None:
        """Takes the format from the tensors as they are now. Raises StorageError for shapes or types that do not fit."""
        self.refuse_misfits()
        self.text = Format(self.scheme, (self.out_features, self.in_features), self.dtype(), self.facts()).text

    def refuse_misfits(self) -> None:
        for name, tensor in self.numbers().items():
            shape, dtype = self.sizes[name]
            if tuple(tensor.shape) != shape:
                raise StorageError(f"{name} of shape {tuple(tensor.shape)}, where the config makes it {shape}")
            if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
                raise StorageError(f"{name} of {tensor.dtype}, where the format has {dtype}")

    def packed(self) -> Packed:
        """The packed numbers as other layers' are recognised."""
        return Packed(of(self.text)[1], self.numbers())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.ops.peft_fx.packed_linear(x, list(self.numbers().values()), bias, self.text)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.settle()  # the scales may have another type now
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.text}"


def after_load(module: NativeLinear, _: object) -> None:
    module.loaded()


def installed(package: str) -> bool:
    """Whether there is a distribution of that name; a folder that could be imported is none."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
