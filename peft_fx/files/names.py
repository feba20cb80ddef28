"""The names that other programs' LoRA files give to a model's modules.

All names are made from the model's own paths, so that a look-up finds a module that is there, or nothing: diffusers' former
names, those of the original code of Stable Diffusion ("sgm") and of Flux, and any of them with `_` for each dot (kohya-ss).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..target import ModuleTable


@dataclass(frozen=True)
class Place:
    """The modules that a name stands for: several where a file has one weight for what the model has side by side.

    swapped: the file has the second half of the output features first.
    """

    paths: tuple[str, ...]
    swapped: bool = False


# diffusers' name of a projection in a text encoder's attention, until transformers' names were used
TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

# sgm's name inside a residual block -> diffusers'
RESIDUAL = {
    "in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip
SGM = {
    "input_blocks.0.0": "conv_in", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip

# (Flux's list, diffusers') -> name in a block -> diffusers', whose weights one below the other are Flux's
FLUX_BLOCKS = {
    ("double_blocks", "transformer_blocks"): {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",), "txt_mlp.0": ("ff_context.net.0.proj",),
        "img_mlp.2": ("ff.net.2",), "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
    },
    ("single_blocks", "single_transformer_blocks"): {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",), "modulation.lin": ("norm.linear",),
    },
}  # fmt: skip
FLUX = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
}  # fmt: skip
FLUX_SWAPPED = {"final_layer.adaLN_modulation.1": "norm_out.linear"}  # shift and scale there, scale and shift here


class Names:
    """Finds what a name in a file stands for."""

    def __init__(self, table: ModuleTable):
        self.exact: dict[str, Place] = {}
        self.flat: dict[str, set[Place]] = {}  # with _ for dots; several places where that makes names equal
        named = (*own_names(table), *former_names(table), *sgm_names(table), *flux_names(table))
        for name, place in named:
            if all(path in table and table[path].parameters for path in place.paths):
                place = Place(tuple(table[path].path for path in place.paths), place.swapped)
                self.exact.setdefault(name, place)
                self.flat.setdefault(name.replace(".", "_"), set()).add(place)

    def find(self, name: str) -> Place | None:
        """None: no module is called that, or several are."""
        places = self.flat.get(name.replace(".", "_"), ())
        return self.exact.get(name) or (next(iter(places)) if len(places) == 1 else None)


def own_names(table: ModuleTable) -> Iterator[tuple[str, Place]]:
    yield from ((path, Place((path,))) for path in table.by_path if path)


def former_names(table: ModuleTable) -> Iterator[tuple[str, Place]]:
    """diffusers once kept LoRA in attention processors, and transformers' CLIP its layers in a module `text_model`."""
    for path in table.by_path:
        named = path.removesuffix(".0") if path.endswith(".to_out.0") else path
        parent, _, child = named.rpartition(".")
        for name in (child, TEXT_ATTENTION.get(child)):
            if name and parent:
                yield f"{parent}.{name}", Place((path,))
                yield f"{parent}.processor.{name}", Place((path,))
                if "text_model" not in table:
                    yield f"text_model.{parent}.{name}", Place((path,))


def sgm_names(table: ModuleTable) -> Iterator[tuple[str, Place]]:
    """Stable Diffusion's own numbering: one running number over all blocks on the way down, another on the way up."""
    for name, path in SGM.items():
        yield name, Place((path,))
    for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield from sgm_layer(table, f"middle_block.{i}", f"mid_block.{part}")
    for way, ours, first in (("input_blocks", "down_blocks", 1), ("output_blocks", "up_blocks", 0)):
        number = first
        for block in numbered(table, ours):
            for layer in numbered(table, f"{block}.resnets"):
                attention = layer.replace("resnets", "attentions")
                yield from sgm_layer(table, f"{way}.{number}.0", layer)
                yield from sgm_layer(table, f"{way}.{number}.1", attention)
                last = f"{way}.{number}.{2 if attention in table else 1}"
                number += 1
            if f"{block}.upsamplers.0" in table:
                yield f"{last}.conv", Place((f"{block}.upsamplers.0.conv",))
            if f"{block}.downsamplers.0" in table:
                yield f"{way}.{number}.0.op", Place((f"{block}.downsamplers.0.conv",))
                number += 1


def sgm_layer(table: ModuleTable, name: str, path: str) -> Iterator[tuple[str, Place]]:
    """A residual block has names of its own inside, an attention block diffusers'."""
    if ".resnets." in path:
        yield from ((f"{name}.{inner}", Place((f"{path}.{part}",))) for inner, part in RESIDUAL.items())
    else:
        inside = (p for p in table.by_path if p.startswith(f"{path}."))
        yield from ((name + p.removeprefix(path), Place((p,))) for p in inside)


def flux_names(table: ModuleTable) -> Iterator[tuple[str, Place]]:
    for (theirs, ours), names in FLUX_BLOCKS.items():
        for i, block in enumerate(numbered(table, ours)):
            for name, parts in names.items():
                yield f"{theirs}.{i}.{name}", Place(tuple(f"{block}.{part}" for part in parts))
    yield from ((name, Place((path,))) for name, path in FLUX.items())
    yield from ((name, Place((path,), swapped=True)) for name, path in FLUX_SWAPPED.items())


def numbered(table: ModuleTable, path: str) -> list[str]:
    """The paths of a list's modules, in order."""
    found = (re.fullmatch(rf"{re.escape(path)}\.(\d+)", p) for p in table.by_path)
    return [m[0] for m in sorted((m for m in found if m), key=lambda m: int(m[1]))]
