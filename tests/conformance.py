"""What the conformance tests share: subjects (a model and one call), PEFT as oracle, and the dense float64 definition.

Comparisons go through PEFT's files wherever they can: the numbers of an adapter, and the gradients of those numbers, are both
dicts from file key to tensor, whoever computed them.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import peft
import tiny
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import ViTConfig, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

import peft_fx as fx

# Subjects


class Attention(nn.Module):
    def __init__(self, cross=False, **options):
        super().__init__()
        self.cross, self.attn = cross, nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x, y):
        return self.attn(x, y, y)[0] if self.cross else self.attn(x, x, x)[0] + y.mean()


class Twice(nn.Module):
    """One module called twice: one target, two sites."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.shared(torch.tanh(self.shared(x))))


class Views(nn.Module):
    """Raw parameters, read through a transposition and as they are."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.out_in, self.inner.in_out = (nn.Parameter(torch.randn(*s) / 3) for s in ((5, 6), (5, 4)))

    def forward(self, x):
        return torch.tanh(x @ self.inner.out_in.t()) @ self.inner.in_out


class Rows(nn.Module):
    """Views that do not leave the axes of a factor whole: chosen rows, experts that are no leading axis, a first operand."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.chosen = nn.Parameter(torch.randn(6, 5) / 3)
        self.inner.second = nn.Parameter(torch.randn(4, 3, 6) / 3)  # experts, seen by bmm as the second axis
        self.inner.first = nn.Parameter(torch.randn(3, 2, 4) / 3)
        self.register_buffer("rows", torch.tensor([3, 0, 5, 1, 1, 2]))

    def forward(self, x):
        h = nn.functional.linear(x, self.inner.chosen[self.rows])  # (3, 4, 6)
        h = torch.bmm(h, self.inner.second.transpose(0, 1).transpose(1, 2))  # (3, 4, 4)
        return torch.bmm(self.inner.first, h)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))))


class Alias(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Only(nn.Module):
    """One layer called `layer`, so that every kind has a path to name, and a head behind it that spreads gradients."""

    def __init__(self, layer, head=None):
        super().__init__()
        self.layer, self.head = layer, head or nn.Identity()

    def forward(self, x):
        return self.head(self.layer(x))


def vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def ids(*shape, vocabulary=32):
    return torch.randint(0, vocabulary, shape)


def text(**more):
    """Token ids with one padded row; a fresh batch size and length on every call, where `more` allows."""
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"input_ids": ids(3, 6), "attention_mask": mask, **more}


def of(layer: Callable[[], nn.Module], *shape, head=None):
    return Subject(lambda: Only(layer(), head and head()), lambda: {"x": torch.randn(3, *shape)})


@dataclass(frozen=True)
class Subject:
    """build: a fresh model (seeded by the caller). inputs: keyword arguments of one call."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]


def lookup(**options):
    return Subject(lambda: Only(nn.Embedding(12, 5, **options)), lambda: {"x": ids(3, 6, vocabulary=12)})


def attention(**options):
    return Subject(lambda: Attention(**options), lambda: {"x": torch.randn(3, 5, 8), "y": torch.randn(3, 4, 8)})


def batched_mixtral():
    model = tiny.mixtral()
    model.set_experts_implementation("batched_mm")
    return model


# Sizes that most methods' divisibility rules allow.
WIDE = {
    "wide": of(lambda: nn.Linear(8, 12), 4, 8),
    "wide_without_bias": of(lambda: nn.Linear(8, 12, bias=False), 4, 8),
    "square": of(lambda: nn.Linear(8, 8), 4, 8),
    "wide_Conv1D": of(lambda: Conv1D(12, 8), 4, 8),
    "wide_conv1d": of(lambda: nn.Conv1d(4, 8, 3, padding=1), 4, 9),
    "wide_conv2d": of(lambda: nn.Conv2d(4, 8, 2, stride=2), 4, 6, 6),
    "wide_conv2d_pointwise": of(lambda: nn.Conv2d(8, 12, 1), 8, 6, 6),
    "wide_conv2d_dilated": of(lambda: nn.Conv2d(4, 8, 2, dilation=2), 4, 6, 6),
    "wide_conv2d_grouped": of(lambda: nn.Conv2d(8, 8, 2, groups=2), 8, 6, 6),
    "wide_conv3d": of(lambda: nn.Conv3d(2, 8, 2, padding=1), 2, 5, 5, 5),
    "wide_embedding": Subject(lambda: Only(nn.Embedding(16, 8)), lambda: {"x": ids(3, 6, vocabulary=16)}),
    "wide_norm": of(lambda: nn.LayerNorm(8), 4, 8),
}

SUBJECTS = {
    **WIDE,
    "linear": of(lambda: nn.Linear(6, 5), 4, 6),
    "linear_without_bias": of(lambda: nn.Linear(6, 5, bias=False), 4, 6),
    "Conv1D": of(lambda: Conv1D(5, 6), 4, 6),
    "conv1d": of(lambda: nn.Conv1d(4, 6, 3), 4, 9),
    "conv2d": of(lambda: nn.Conv2d(4, 6, 3), 4, 9, 9),
    "conv2d_options": of(lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), 4, 9, 9),
    "conv2d_same": of(lambda: nn.Conv2d(4, 6, 3, padding="same"), 4, 9, 9),
    "conv2d_without_bias": of(lambda: nn.Conv2d(4, 6, 3, bias=False), 4, 9, 9),
    "conv3d": of(lambda: nn.Conv3d(2, 4, 2, padding=1), 2, 5, 5, 5),
    "conv1d_dilated": of(lambda: nn.Conv1d(4, 6, 3, dilation=2), 4, 9),
    "conv2d_dilated": of(lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), 4, 9, 9),
    "conv2d_same_dilated": of(lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), 4, 9, 9),
    "conv2d_circular": of(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), 4, 9, 9),
    "conv2d_reflect": of(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 4, 9, 9),
    "conv3d_pointwise": of(lambda: nn.Conv3d(2, 4, 1), 2, 5, 5, 5),
    "conv1d_grouped": of(lambda: nn.Conv1d(4, 6, 3, groups=2), 4, 9),
    "conv2d_grouped": of(lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), 4, 9, 9),
    "conv2d_depthwise": of(lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"), 4, 9, 9),
    "conv3d_grouped": of(lambda: nn.Conv3d(4, 6, 2, groups=2), 4, 5, 5, 5),
    "embedding": lookup(),
    "embedding_padded": lookup(padding_idx=3),
    "embedding_max_norm": lookup(max_norm=0.5),
    "embedding_by_frequency": lookup(scale_grad_by_freq=True),
    "attention": attention(),
    "attention_without_bias": attention(bias=False),
    "attention_cross": attention(cross=True),
    "attention_cross_without_bias": attention(cross=True, bias=False),
    "twice": Subject(Twice, lambda: {"x": torch.randn(3, 4, 6)}),
    "views": Subject(Views, lambda: {"x": torch.randn(3, 4, 6)}),
    "rows": Subject(Rows, lambda: {"x": torch.randn(3, 4, 5)}),
    "alias": Subject(Alias, lambda: {"x": torch.randn(3, 4, 6)}),
    "normed": Subject(Normed, lambda: {"x": torch.randn(3, 3, 6, 6)}),
    "llama": Subject(tiny.llama, text),
    "tied_llama": Subject(tiny.tied_llama, text),
    "biased_llama": Subject(tiny.biased_llama, text),
    "gpt2": Subject(tiny.gpt2, text),
    "bert": Subject(tiny.bert, text),
    "t5": Subject(tiny.t5, lambda: text(decoder_input_ids=ids(3, 4))),
    "vit": Subject(vit, lambda: {"pixel_values": torch.randn(3, 3, 8, 8)}),
    "mixtral": Subject(tiny.mixtral, text),
    "mixtral_batched": Subject(batched_mixtral, text),
}


def build(name: str, dtype=torch.float32) -> nn.Module:
    """The subject's model with seeded weights, biases other than zero, in eval mode."""
    torch.manual_seed(0)
    model = SUBJECTS[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def inputs(name: str, dtype=torch.float32) -> dict:
    torch.manual_seed(1)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in SUBJECTS[name].inputs().items()}


@functools.cache
def captured(name: str, dtype=torch.float32):
    """One capture per subject and process. Adapters never change a base graph, so all tests may share it."""
    return fx.capture(build(name, dtype), kwargs=inputs(name, dtype))


# Numbers


def floats(output) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
            if isinstance(t, torch.Tensor) and t.is_floating_point()]  # fmt: skip


def run(model, name: str, dtype=torch.float32) -> list[torch.Tensor]:
    with torch.no_grad():
        return floats(model(**inputs(name, dtype)))


def error(ours, theirs) -> float:
    """Largest difference over the largest value, over lists or dicts of tensors that must correspond."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
        ours, theirs = [ours[k] for k in theirs], list(theirs.values())
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.numel()]
    scale = max(float(b.double().abs().max()) for _, b in pairs)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs) / scale


def rms_error(ours, theirs) -> float:
    """Root mean square of the difference over that of the value: what rounding does on average."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in theirs)) ** 0.5


def loss(output: list[torch.Tensor]) -> torch.Tensor:
    """A scalar to which every output element contributes differently."""
    generator = torch.Generator().manual_seed(2)
    return sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum() for t in output)


def randomise(model: nn.Module, seed: int = 3) -> None:
    """Moves every trainable parameter away from where it starts, so that nothing is zero and no copy equals its original."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


def gradients(
    model: nn.Module, name: str, save: Callable[[Path], object], dtype=torch.float32, adapter=""
) -> dict[str, torch.Tensor]:
    """File key -> gradient: the gradients are put in the parameters' place and saved as an adapter, then put back.

    adapter: only tensors with this in their name need a gradient. They are added there: PEFT has two Parameters on one memory where a transposed factor is shared.
    """
    model.zero_grad()
    loss(floats(model(**inputs(name, dtype)))).backward()
    trainable = [p for n, p in model.named_parameters() if p.requires_grad and adapter in n]
    before = [p.detach().clone() for p in trainable]
    with torch.no_grad():
        for p in trainable:
            p.zero_()
        for p in trainable:
            assert p.grad is not None, "a trainable tensor got no gradient"
            p.add_(p.grad)
        found = saved(save)
        for p, old in zip(trainable, before, strict=True):
            p.copy_(old)
    model.zero_grad()
    return found


def saved(save: Callable[[Path], object]) -> dict[str, torch.Tensor]:
    """File key -> tensor of what `save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        (file,) = Path(folder).rglob("adapter_model.safetensors")
        # with bias="all" PEFT writes the biases inside saved modules again, under keys that it cannot load
        return {k: t.clone() for k, t in load_file(file).items()
                if ".original_module." not in k and ".modules_to_save." not in k}  # fmt: skip


# PEFT


def quiet(function, *args, **kwargs):
    """PEFT warns of much that is of no concern here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def peft_model(name: str, options: dict, dtype=torch.float32):
    """PEFT's model for the same config on the same weights, its trained tensors randomised."""
    torch.manual_seed(4)
    model = quiet(peft.get_peft_model, build(name, dtype), peft_config(options)).eval()
    randomise(model)
    return model


def peft_config(options: dict):
    """PEFT's config object; a LoraConfig unless the options say peft_type."""
    options = dict(options)
    return PEFT_TYPE_TO_CONFIG_MAPPING[options.pop("peft_type", "LORA")](**options)


def save_peft(model, folder, adapter: str = "default") -> Path:
    quiet(model.save_pretrained, folder, selected_adapters=[adapter], save_embedding_layers=False)
    return Path(folder) if adapter == "default" else Path(folder) / adapter


# The definition, in float64


def dense_delta(
    kind: str, A: torch.Tensor, B: torch.Tensor, scale: float, shape: tuple[int, ...], experts: int = 1
) -> torch.Tensor:
    """scale * B A as the stored weight has it; written without regard to how peft_fx computes it. shape: the dense weight's."""
    if kind == "embedding":
        return scale * (B @ A).t()
    if kind == "Conv1D":
        return scale * (B @ A).t()
    if kind == "expert":
        A_e = A.reshape(experts, -1, A.shape[1])
        return scale * torch.stack([B[:, e::experts] @ A_e[e] for e in range(experts)])
    if kind == "conv":  # output channel o is in group g and sees the g-th part of the ranks
        out, per_group = B.shape[:2]
        groups, rows = A.shape[0] // per_group, []
        for o in range(out):
            g = o // (out // groups)
            rows.append(torch.einsum("r,r...->...", B[o].flatten(), A[g * per_group : (g + 1) * per_group]))
        return scale * torch.stack(rows).reshape(shape)
    return scale * (B @ A)


def ungrouped(conv: nn.Module) -> nn.Module:
    """The convolution with groups=1 that computes the same, weights copied channel by channel."""
    new = copy.deepcopy(conv)
    inputs_per_group, outputs_per_group = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    weight = conv.weight.new_zeros(conv.out_channels, conv.in_channels, *conv.weight.shape[2:])
    for o in range(conv.out_channels):
        first = o // outputs_per_group * inputs_per_group
        weight[o, first : first + inputs_per_group] = conv.weight.detach()[o]
    new.groups, new.weight = 1, nn.Parameter(weight)
    return new


@dataclass
class Definition:
    """A subject's model in float64 whose adapted weights are W + delta, dense and in place.

    parts: file prefix (`layer`, `attn.base_layer.out_proj`) -> (parameter name, kind, scale).
    """

    model: nn.Module
    parts: dict[str, tuple[str, str, float]]
    tensors: dict[str, torch.Tensor]  # file key -> float64 leaf that requires grad
    extra: dict = field(default_factory=dict)

    def weights(self) -> dict[str, torch.Tensor]:
        found = dict(self.model.named_parameters())
        for prefix, (parameter, kind, scale) in self.parts.items():
            key = f"base_model.model.{prefix}."
            suffix = "lora_embedding_" if kind == "embedding" else "lora_"
            end = "" if kind == "embedding" else ".weight"
            A, B = self.tensors[f"{key}{suffix}A{end}"], self.tensors[f"{key}{suffix}B{end}"]
            W = found[parameter]
            found[parameter] = W + dense_delta(kind, A, B, scale, W.shape, W.shape[0] if W.dim() == 3 else 1)
            if f"{key}lora_B.bias" in self.tensors:
                bias = parameter.removesuffix("weight") + "bias"
                found[bias] = found.get(bias, 0) + scale * self.tensors[f"{key}lora_B.bias"]
        return found

    def __call__(self, **kwargs):
        # tie_weights: torch would leave a module under two names with the other weights
        return functional_call(self.model, self.weights(), kwargs=kwargs, tie_weights=False)

    def run(self, name):
        with torch.no_grad():
            return floats(self(**inputs(name, torch.float64)))

    def gradients(self, name) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss(floats(self(**inputs(name, torch.float64)))), list(self.tensors.values()))
        return dict(zip(self.tensors, found, strict=True))


def definition(name: str, tensors: dict[str, torch.Tensor], parts: dict) -> Definition:
    model = build(name).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # torch's grouped_mm has no float64
    for path, module in list(model.named_modules()):
        if getattr(module, "groups", 1) > 1:
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], ungrouped(module))
    for path in [p.removesuffix(".weight") for p, _, _ in parts.values()]:
        module = model.get_submodule(path) if path in dict(model.named_modules()) else None
        if (
            module is not None
            and getattr(module, "bias", 0) is None
            and any(k.endswith("lora_B.bias") for k in tensors)
        ):
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0], dtype=torch.float64))
    model.requires_grad_(False)
    return Definition(model, parts, {k: t.double().requires_grad_() for k, t in tensors.items()})


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    """Changes the tensors of an adapter folder."""
    file = Path(folder) / "adapter_model.safetensors"
    save_file({k: t.contiguous() for k, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})
