"""What a method is: pure functions over tensors in canonical layout, and a description of the tensors they need.

Canonical layout of a weight: (experts?, out, in, *kernel). A method never sees an operator, a graph or a storage format;
passes bring the weight to this layout, call the method, and bring the result back.

    weight(W, b, theta)     -> W', b'   the definition; serves every operator kind, merge and export

and, where it saves work, one activation form, by the shape of the method:

    Additive   factors(theta)        -> Factors   y + scale * (B (A x) + bias), never the dense delta
    Branch     delta(x, theta)       -> dy        y + dy, for updates with a fast product that is not two factors
    InputMap   map_input(x, theta)   -> x'        linear in x, last axis = input features
    OutputMap  map_output(y, theta)  -> y'        linear in y, last axis = output features; acts on the bias too
    Rewrite    none                               the weight is rewritten in every forward
    Substitute none                               the weight is the adapter's own

Each shape derives `weight` where it can, so that one function is all there is to write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..config import AdapterConfig
from ..kernels import product
from ..target import ModuleRecord, Target

Theta = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Pieces:
    """How files hold one tensor in pieces, `<key>.0`, `<key>.1`, ..., whose shapes may depend on numbers.

    join: (empty tensor, pieces, *needed) -> None, or why they do not fit; needed: what `Tensor.needs` names, as for `init`.
    split: (tensor, *others) -> `count` pieces; others: the tensors of the target that `reads` names.
    ends: what stands behind the key, where not .0, .1, ...
    """

    count: int
    join: Callable[..., str | None]
    split: Callable[..., Sequence[torch.Tensor]]
    reads: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


HALF = frozenset({torch.bfloat16, torch.float16})  # adapters of bases in these are float32


@dataclass(frozen=True)
class Tensor:
    """A tensor that a method keeps for one target.

    init: writes the initial value in place, (empty tensor, base weight in canonical layout or None) -> None.
    sources: targets whose weights `init` takes, as one list, in place of the base weight.
    needs: names of the method's tensors before this one, whose values `init` takes as further arguments.
    key: suffix of its key in PEFT's adapter file; None if it is not saved.
    trainable: a Parameter that requires grad; otherwise a buffer.
    dtype: None means fp32 for half-precision bases and the base's dtype otherwise. like_base: always the base's dtype.
    pad: (axis, blocks) for axes that grow with the method's rank: a smaller adapter fits into a larger one with zeros at
        the end of each of `blocks` equal parts of the axis.
    stacked: the first axis counts experts.
    pieces: how a file holds it, where not as one tensor.
    derived: it follows from the config alone, so that it is no state: `init` makes it anew where its numbers were lost.
    below: a file's numbers are integers from 0 to less than this; nested tuples stand for limits that broadcast.
    """

    shape: tuple[int, ...]
    init: Callable[..., object]
    key: str | None = None
    trainable: bool = True
    dtype: torch.dtype | None = None
    like_base: bool = False
    pad: tuple[tuple[int, int], ...] = ()
    needs: tuple[str, ...] = ()
    sources: tuple[Target, ...] = ()
    stacked: bool = False
    pieces: Pieces | None = None
    derived: bool = False
    below: int | tuple | None = None

    def dtype_on(self, base: torch.dtype) -> torch.dtype:
        """The dtype it has for a base weight of dtype `base`."""
        return self.dtype or (base if self.like_base or base == torch.float64 else torch.float32)


@dataclass(frozen=True)
class Together:
    """Tensors that a method can only describe when it sees all targets.

    shared: one tensor for all targets; its `key` stands alone in the file, without a module path. own: target name ->
    further tensors of that target. grouped: like shared, for the targets of the given names only.
    A `key` that begins with a dot stands behind every target's module path: each files its copy.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    grouped: tuple[tuple[dict[str, Tensor], tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Factors:
    """Factors of an additive update in canonical layout.

    A: (experts?, r, in, *kernel), all input channels. B: (experts?, out, r / groups). scale: 0-d. bias: (out,) or None.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None


class Method:
    """Base of the shapes a method can have. Stateless: one instance serves all targets."""

    name: str
    Config: type[AdapterConfig]
    # operator kind -> why the method has no meaning there; {name} and {shape} are filled in
    refuses: dict[str, str] = {}
    # operator kind -> the registered method to use there
    variants: ClassVar[dict[str, str]] = {}
    # what an activation form finds in theta besides the tensors: "W", the base weight in canonical layout; "y" (a Branch
    # only), the base's product x Wᵀ without the bias, of the dropped x where there is input dropout
    reads: tuple[str, ...] = ()
    # what of the update sees the input before the dropout, "y" too: like `weight`, without the rest; None: nothing
    undropped: Callable | None = None
    # True: in half precision the weight form is taken, so that a merge rounds nothing that the forward did not
    rounds_weight: bool = False
    # True: takes weights with an axis for experts as they are; else it sees each expert as a linear weight of its own
    stacks: bool = False
    drops: ClassVar[str] = ""  # the field of the config with the dropout on the update's input
    written: ClassVar[tuple[str, ...]] = ()  # fields that are written into the graph, not held in tensors
    # tensors and the values at which the method acts as if it were absent, whether or not a target has them all; None:
    # there are none
    off: ClassVar[dict[str, float] | None] = None
    no_weight: str = ""  # why no weight stands for the method, where none does: it cannot be merged then
    one_size: str = ""  # why a smaller adapter cannot be padded into a larger one's tensors that have no `pad`

    def at(self, target: Target, config: AdapterConfig) -> Method:
        """The method to use, where a config stands for several: another registered one, or itself."""
        return self

    def places(self, chosen: Target, record: ModuleRecord, config: AdapterConfig) -> Sequence[Target]:
        """What to adapt of a chosen module: its weight, unless the method takes more of it."""
        return (chosen,)

    def check(self, target: Target, config: AdapterConfig) -> str | None:
        """The reason why this target cannot be adapted, or None; `refuses` has been looked at."""
        return None

    def advice(self, target: Target, config: AdapterConfig) -> str | None:
        """What to warn of on this target, though it can be adapted, or None."""
        if getattr(config, "save_projection", True):
            return None
        return (
            "save_projection=False: files hold a seed in place of the projections, which another version of torch may draw "
            "differently"
        )

    def tensors(self, target: Target, config: AdapterConfig) -> dict[str, Tensor]:
        """Name -> description of every tensor the method keeps for `target`."""
        raise NotImplementedError

    def together(self, targets: Sequence[Target], config: AdapterConfig) -> Together:
        """Tensors that depend on all targets of the adapter at once; none by default."""
        return Together()

    def weight(
        self, W: torch.Tensor, b: torch.Tensor | None, theta: Theta, target: Target, config: AdapterConfig
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The adapted weight and bias, both in canonical layout and in W's dtype."""
        raise NotImplementedError

    def training_weight(self, W, b, theta: Theta, target: Target, config: AdapterConfig):
        """`weight` as graphs have it: a literal F.dropout(..., True) in it follows their mode. The same in evaluation."""
        return self.weight(W, b, theta, target, config)

    def dropout(self, config: AdapterConfig) -> float:
        """The config's dropout on the update's input."""
        return getattr(config, self.drops) if self.drops else 0.0

    def input_dropout(self, target: Target, config: AdapterConfig) -> float:
        """Dropout on the update's input while training, which the weight form cannot have. Ids are not dropped."""
        return 0.0 if target.reads_ids else self.dropout(config)

    def activation_only(self, target: Target, config: AdapterConfig) -> str | None:
        """What the weight form would lose, besides the dropout on the input; None if nothing."""
        return self.no_weight or None

    def literals(self, target: Target, config: AdapterConfig) -> tuple:
        """What of the config is written into the graph: a hotswap needs the same."""
        return tuple(getattr(config, name) for name in self.written)

    def neutral(self, target: Target, config: AdapterConfig) -> dict[str, float] | None:
        """Tensor name -> value that makes the method act as if it were absent; None if nothing does."""
        return self.off

    def own_rows(self, target: Target, config: AdapterConfig) -> Sequence[int]:
        """Rows of the stored weight that the adapter's own numbers stand for, whatever was there; () for updates."""
        return ()

    def dense_groups(self, target: Target) -> bool:
        """True if the update crosses the groups of a grouped convolution: `weight` then sees and returns all channels."""
        return False

    def tied(self, target: Target, source: Target, config: AdapterConfig) -> dict[str, tuple[str, bool]] | None:
        """How `target` can use the tensors of `source`, whose weight is the same tensor, so that both stay tied.

        Name of a tensor here -> (name of a tensor there, whether it is its transpose). None: no such form.
        """
        return None


class Branch(Method):
    """W' = W + dW with a fast product `delta`; the update itself is `delta` of the unit vectors."""

    def delta(self, x: torch.Tensor, theta: Theta, target: Target, config: AdapterConfig) -> torch.Tensor:
        """(..., in) -> (..., out), linear in x."""
        raise NotImplementedError

    def weight(self, W, b, theta, target, config):
        flat = W.flatten(-1 - len(target.kernel)) if target.kernel else W
        found = {name: {"W": flat, "y": flat.mT}[name] for name in self.reads}
        return W + self.delta(unit_vectors(flat), theta | found, target, config).mT.reshape(W.shape), b


class InputMap(Method):
    """y = W M(x): W' = W M, row by row Mᵀ. On convolutions x is the unfolded patch, so that the weight form serves them."""

    def map_input(self, x: torch.Tensor, theta: Theta, target: Target, config: AdapterConfig) -> torch.Tensor:
        """(..., n) -> (..., n), linear in x."""
        raise NotImplementedError

    def weight(self, W, b, theta, target, config):
        flat = W.flatten(-1 - len(target.kernel)) if target.kernel else W
        images = self.map_input(unit_vectors(flat), theta, target, config)  # row i: M(e_i)
        return (flat @ images.mT).reshape(W.shape), b


class OutputMap(Method):
    """y' = M(W x + b): W' = M W column by column, b' = M b."""

    def map_output(self, y: torch.Tensor, theta: Theta, target: Target, config: AdapterConfig) -> torch.Tensor:
        """(..., m) -> (..., m), linear in y."""
        raise NotImplementedError

    def weight(self, W, b, theta, target, config):
        flat = W.flatten(-1 - len(target.kernel)) if target.kernel else W
        W = self.map_output(flat.mT, theta, target, config).mT.reshape(W.shape)
        return W, None if b is None else self.map_output(b, theta, target, config)


class Rewrite(Method):
    """W' is computed from W in every forward; `weight` is the only function to write."""


class Additive(Method):
    """W' = W + scale * B A, b' = b + scale * bias; `factors` is the only function to write."""

    def factors(self, theta: Theta, target: Target, config: AdapterConfig) -> Factors:
        raise NotImplementedError

    def between(self, h: torch.Tensor, axis: int, theta: Theta, target: Target, config: AdapterConfig) -> torch.Tensor:
        """What B is applied to in the activation form: h = scale * A x, its features on `axis`, or what becomes of them."""
        return h

    def weight(self, W, b, theta, target, config, out=None):
        """out: memory for W', contiguous or its transpose."""
        f = self.factors(theta | {"W": W} if self.reads else theta, target, config)
        groups = f.A.shape[-2 - len(target.kernel)] // f.B.shape[-1]
        B = block_diagonal(f.B, groups) if groups > 1 else f.B
        A, flat = (t.flatten(-1 - len(target.kernel)) if target.kernel else t for t in (f.A, W))
        # one product into W: the update of a stack of experts never exists by itself
        add_product = torch.baddbmm if flat.dim() == 3 else torch.addmm if out is None else product.added
        out = None if out is None else out.view(flat.shape)
        W = add_product(flat, f.scale * B, A, out=out).reshape(W.shape)
        if f.bias is not None:
            b = f.scale * f.bias if b is None else b + f.scale * f.bias
        return W, b


class Substitute(Method):
    """W' is the adapter's own tensor: modules to save, trained biases, trainable tokens."""


def unit_vectors(flat: torch.Tensor) -> torch.Tensor:
    """(n, n) identity for a weight (..., out, n), on its device and in its dtype."""
    return torch.diag_embed(flat.new_ones(flat.shape[-1]))


def block_diagonal(W: torch.Tensor, groups: int) -> torch.Tensor:
    """(out, n / g, *rest) -> (out, n, *rest): row block i keeps its columns at column block i, zeros elsewhere.

    Of a grouped convolution's weight this is the weight of the equal ungrouped one.
    """
    blocks = W.unflatten(0, (groups, -1))  # (g, out / g, n / g, *rest)
    eye = torch.diag_embed(W.new_ones(groups))
    return torch.einsum("gon...,gh->gohn...", blocks, eye).reshape(W.shape[0], groups * W.shape[1], *W.shape[2:])
