"""LoRA files that are no adapter folder of PEFT's: diffusers', today's and its older ones, kohya-ss's and LyCORIS's.

    <component><module><tensor>        lora_unet_down_blocks_0_..._to_q.lora_down.weight,  unet.down_blocks.0...to_q.lora_A.weight

A file may hold several components (UNet, text encoders): the one whose modules are all in the model is taken. Result: a config,
and tensors under PEFT's keys. A module's scale is alpha / r, and 1 where the file has no alpha.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from ..config import AdapterConfig
from ..errors import AdapterFileError, RecipeError
from ..notices import warn
from ..planning.plan import PREFIX, make_plan
from ..recipe import config_from_dict
from ..suggestions import lookalikes
from ..target import ModuleTable, sizes
from .inferred import ALPHA, Tensors, inferred
from .match import match_tensors
from .names import Names, Place

DENOISER = "the denoiser (unet or transformer)"
# how a key begins -> the component that it belongs to
COMPONENTS = {
    "unet.": DENOISER, "transformer.": DENOISER, "diffusion_model.": DENOISER,
    "lora_unet_": DENOISER, "lora_transformer_": DENOISER,
    "text_encoder.": "text_encoder", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoder_2.": "text_encoder_2", "lora_te2_": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3", "lora_te3_": "text_encoder_3",
}  # fmt: skip
UNNAMED = "no named part"  # of keys that begin with a module, the model's own if all is well

# how a key ends -> method, and PEFT's name for the tensor
TENSORS = {
    **{end: ("LORA", "lora_A.weight") for end in (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight",
       ".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight")},
    **{end: ("LORA", "lora_B.weight") for end in (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight",
       ".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight")},
    ".lora_B.bias": ("LORA", "lora_B.bias"),
    **{end: ("LORA", "lora_magnitude_vector") for end in (".lora_magnitude_vector", ".lora_magnitude_vector.weight",
       ".dora_scale")},
    **{f".{name}": ("LOHA", name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".{name}": ("LOKR", name) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
       "lokr_t2")},
    ".alpha": (None, ALPHA),
}  # fmt: skip
# the tensors whose rows are the output features: they are cut where one weight of the file is several of the model
BY_ROWS: dict[str | None, tuple[str, ...]] = {
    "LORA": ("lora_B.weight", "lora_B.bias", "lora_magnitude_vector"),
    "LOHA": ("hada_w1_a", "hada_w2_a"),
}
SHOWN = 5


@dataclass
class Component:
    """What a file has for one part of a pipeline: module path -> tensors, and the names that the model has no module for."""

    modules: dict[str, Tensors] = field(default_factory=lambda: defaultdict(dict))
    unknown: dict[str, None] = field(default_factory=dict)
    prefixes: set[str] = field(default_factory=set)
    methods: set[str] = field(default_factory=set)


def from_foreign(
    tensors: Tensors, metadata: dict[str, str], table: ModuleTable, *, where: str
) -> tuple[AdapterConfig, Tensors]:
    """The config and PEFT's keys -> tensors of the part of a file that is for the model of `table`.

    where: what to call the file in messages. Raises AdapterFileError with what is unknown, fits nothing, or fits twice.
    """
    try:
        components = sorted_out(tensors, table)
        made = {n: made_for(c, metadata, table, where) for n, c in components.items() if c.modules and not c.unknown}
        if len(made) > 1:  # encoders of two sizes have modules of the same names
            made = {name: files for name, files in made.items() if fits(table, *files)} or made
        if len(made) != 1:
            raise AdapterFileError(none_fits(components, table) if not made else several_fit(made))
    except (AdapterFileError, RecipeError) as error:
        raise AdapterFileError(f"{where}: {error}") from error
    (name,) = made
    if left := [f"{n} ({count(c)})" for n, c in components.items() if n != name]:
        warn(f"{where}: left out what is for other parts of a pipeline: {', '.join(left)}")
    return made[name]


# Which module a key means


def sorted_out(tensors: Tensors, table: ModuleTable) -> dict[str, Component]:
    """Every tensor of the file, by the component that its key names."""
    if any(key.startswith(PREFIX) for key in tensors):
        raise AdapterFileError(
            "has PEFT's keys, whose scale is in adapter_config.json: give the folder with both files"
        )
    names, components = Names(table), defaultdict[str, Component](Component)
    places: dict[str, tuple[str, str, Place | None]] = {}
    for key, tensor in tensors.items():
        end = max((e for e in TENSORS if key.endswith(e)), key=len, default="")
        name = key.removesuffix(end) if end else key
        if name not in places:
            places[name] = place_of(name, names)
        component, prefix, place = places[name]
        found = components[component]
        found.prefixes.add(prefix)
        if place is None or not end:
            found.unknown[key if not end else name] = None
            continue
        method, tensor_name = TENSORS[end]
        found.methods |= {method} if method else set()
        for path, part in parts_of(name, tensor, tensor_name, method, place, table):
            if tensor_name in found.modules[path]:
                raise AdapterFileError(f"{key}: the file has another {tensor_name} for module {path}")
            found.modules[path][tensor_name] = as_peft(key, part, end)
    return dict(components)


def place_of(name: str, names: Names) -> tuple[str, str, Place | None]:
    """(component, prefix, place) of a module's name: as it is, or behind the prefix of a component."""
    if place := names.find(name):
        return UNNAMED, "", place
    prefix = max((p for p in COMPONENTS if name.startswith(p)), key=len, default="")
    return COMPONENTS.get(prefix, UNNAMED), prefix, names.find(name.removeprefix(prefix)) if prefix else None


def parts_of(
    name: str, tensor: torch.Tensor, tensor_name: str, method: str | None, place: Place, table: ModuleTable
) -> list[tuple[str, torch.Tensor]]:
    """(path, tensor) for each module that the name stands for: rows are cut, everything else is shared."""
    if len(place.paths) == 1 and not place.swapped:
        return [(place.paths[0], tensor)]
    if method is not None and method not in BY_ROWS:
        raise AdapterFileError(
            f"{name}: a {method} update of {len(place.paths)} weights in one cannot be cut into one each"
        )
    if tensor_name not in BY_ROWS.get(method, ()):
        return [(path, tensor) for path in place.paths]
    rows = [table[path].parameters["weight"][0] for path in place.paths]
    if tensor.dim() == 0 or len(tensor) != sum(rows):
        raise AdapterFileError(
            f"{name}: {tensor_name} has shape {sizes(tensor.shape)}, expected {sum(rows)} rows, those of "
            f"{', '.join(place.paths)}"
        )
    if place.swapped:
        return [(place.paths[0], torch.cat(tensor.chunk(2)[::-1]))]
    return list(zip(place.paths, tensor.split(rows), strict=True))


def as_peft(key: str, tensor: torch.Tensor, end: str) -> torch.Tensor:
    """LyCORIS has DoRA's magnitudes as (out, 1, ...), PEFT as (out,), on convolutions as (1, out, 1, ...)."""
    if end != ".dora_scale":
        return tensor
    if tensor.dim() < 2 or tensor.numel() != len(tensor):
        raise AdapterFileError(f"{key}: has shape {sizes(tensor.shape)}: DoRA is done with a magnitude per output feature, "
                               "(out, 1, ...), not per input feature")  # fmt: skip
    return tensor.flatten() if tensor.dim() == 2 else tensor.transpose(0, 1)


# Which component is meant


def made_for(
    component: Component, metadata: dict[str, str], table: ModuleTable, where: str
) -> tuple[AdapterConfig, Tensors]:
    """A component's config, and PEFT's keys -> tensors."""
    if len(component.methods) != 1:
        found = " and ".join(sorted(component.methods)) or "alphas alone"
        raise AdapterFileError(f"has {found}: expected the tensors of one method")
    (method,), modules = component.methods, component.modules
    config = config_from_dict(inferred(method, modules, metadata, component.prefixes, table), where)
    items = ((path, name, t) for path, found in modules.items() for name, t in found.items() if name != ALPHA)
    return config, {f"{PREFIX}{path}.{name}": tensor for path, name, tensor in items}


def fits(table: ModuleTable, config: AdapterConfig, tensors: Tensors) -> bool:
    try:
        match_tensors(make_plan(table, "file", config), tensors, where="")
    except (AdapterFileError, RecipeError):
        return False
    return True


def none_fits(components: dict[str, Component], table: ModuleTable) -> str:
    """What the best component has that the model has not, or what there is if nothing fits at all."""
    best = max(components.values(), key=lambda c: len(c.modules), default=Component())
    if not best.modules:
        found = [f"{count(c)} of {name}, e.g. {next(iter(c.unknown), '')}" for name, c in components.items()]
        return f"names no module of this {table.model_class or 'model'}; it has {'; '.join(found) or 'no tensors'}"
    lines = []
    for name in list(best.unknown)[:SHOWN]:
        prefix = max((p for p in best.prefixes if name.startswith(p)), key=len, default="")
        flat = {path.replace(".", "_"): path for path in table.by_path}
        near = lookalikes(name.removeprefix(prefix).replace(".", "_"), flat, 1, 0.6)
        lines.append(name + (f" (nearest module: {flat[near[0]]})" if near else ""))
    more = [f"... and {len(best.unknown) - SHOWN} more"] if len(best.unknown) > SHOWN else []
    return "\n  ".join([f"{len(best.unknown)} of its names mean nothing in this model, or a tensor of no known kind:",
                        *lines, *more])  # fmt: skip


def several_fit(made: dict) -> str:
    return f"{' and '.join(made)} both fit this model: leave one of them in the file"


def count(component: Component) -> str:
    return f"{len(component.modules) + len(component.unknown)} module(s)"
