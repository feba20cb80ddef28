"""What a scheme says of how it keeps a weight. One file each; none knows a method, and no method knows one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import StorageError
from ..kernels.packed import Tensors
from .formats import Format
from .grids import Grid
from .packed import Packed


class Storage:
    """One scheme, stateless. Its tensors have an order, in which all functions take them: that of `Packed`'s buffers.

    title: for tables and messages. extra: of pyproject.toml, with the package whose layers are recognised; "" if none is needed.
    """

    name = ""
    title = ""
    extra = ""

    def recognise(self, module: nn.Module, parameter: str) -> Packed | None:
        """What keeps `parameter` of a module of this scheme's package, over the module's own tensors; None for any other module.

        By classes, never by names of buffers: those of different schemes are alike. No package is imported for it
        (`recognise.made_by`). Raises StorageError for a layer that its package has repacked beyond recognition.
        """
        return None

    def layer(self, module: nn.Module) -> type[nn.Module] | None:
        """The class whose forward does with the dense weight what the module does, where its bases say it wrongly.

        None: it is what `twins.base_of` takes from the bases: torch's layer, or the module's own code.
        """
        return None

    def dequantize(self, tensors: Tensors, f: Format) -> torch.Tensor:
        """The dense weight, f.shape, f.dtype: functional ATen, traceable with fakes; same bits as the package's."""
        raise NotImplementedError

    def fast(self, tensors: Tensors, f: Format) -> torch.Tensor | None:
        """The same bits by a package's kernel, if it is imported and takes these; None: not here."""
        return None

    def dense(self, tensors: Tensors, f: Format) -> torch.Tensor:
        """The dense weight, by the package's kernel where there is one for it."""
        found = self.fast(tensors, f)
        return self.dequantize(tensors, f) if found is None else found

    def linear(self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, f: Format) -> torch.Tensor | None:
        """A product that is not that with the dense weight (inputs that are quantized too); None: it is."""
        return None

    def rounds_inputs(self, f: Format) -> bool:
        """Whether `linear` has a product of its own for such weights, with inputs that are rounded to 8 bits."""
        return False

    def rows(self, tensors: Tensors, ids: torch.Tensor, f: Format) -> torch.Tensor:
        """W[ids], (*ids.shape, f.shape[1])."""
        return F.embedding(ids, self.dequantize(tensors, f))

    def quantize(self, W: torch.Tensor, like: Packed) -> dict[str, torch.Tensor]:
        """The tensors that keep W, f.shape, in the format of `like` as the package would make them.

        Raises StorageError with the reason, where there is no such quantizer.
        """
        raise StorageError(f"{self.title} has no quantizer here: merge with storage='dense'")

    def requantized(self, W: torch.Tensor, tensors: dict[str, torch.Tensor], f: Format) -> torch.Tensor:
        """The dense weight that is left of W once `quantize` has packed it like these tensors."""
        like = Packed(f, tensors)
        return like.again(self.quantize(W, like)).dense()

    def grid(self, tensors: Tensors, f: Format) -> Grid:
        """What a weight can be made of with the scales that these tensors have; float32, broadcast to f.shape.

        Raises StorageError with the reason, where its numbers do not stand one by one.
        """
        raise StorageError(
            f"{self.title} does not keep its numbers one by one: merge with storage='requantize' or 'dense'"
        )

    def pack(self, codes: torch.Tensor, like: Packed) -> dict[str, torch.Tensor]:
        """The tensors of `like` with other codes: places in its grid's levels, f.shape. Raises StorageError as `grid` does."""
        raise StorageError(
            f"{self.title} does not keep its numbers one by one: merge with storage='requantize' or 'dense'"
        )

    def fold(self, delta: torch.Tensor, like: Packed) -> dict[str, torch.Tensor] | None:
        """The tensors of `like` whose zero points have taken the mean of an update, f.shape, over each group, codes as they are:
        exact, as far as zero points can be, where the update is the same in all of a group (QA-LoRA, arXiv:2309.14717).

        None: there are no zero points, or they are whole numbers.
        """
        return None

    def place(self, module: nn.Module, parameter: str, new: Packed) -> Callable[[], None]:
        """Gives a package's layer other packed numbers; returns what gives it back the objects that it had."""
        raise StorageError(f"{type(module).__name__} takes no other numbers: merge with storage='dense'")
