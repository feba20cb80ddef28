"""LoRA files of other programs for the tests test_lora_files*.py: models of pipelines, and one adapter in any format."""

import functools
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from peft_fx.files import match_tensors, read_adapter
from peft_fx.planning.modules import module_table
from peft_fx.planning.plan import PREFIX, make_plan

diffusers = pytest.importorskip("diffusers")

KOHYA = ("lora_down.weight", "lora_up.weight")
ATTENTION_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def unet(**options):
    """As SDXL's in structure: attention in the lower block, linear projections, further conditions."""
    return diffusers.UNet2DConditionModel(**{
        "block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": 8,
        "attention_head_dim": 4, "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 30,
        **ATTENTION_BLOCKS, **options})  # fmt: skip


def flux(**options):
    return diffusers.FluxTransformer2DModel(**{
        "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 4,
        "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 6, "axes_dims_rope": (2, 2, 0),
        "guidance_embeds": True, **options})  # fmt: skip


def text_encoder(width=8, layers=2, kind=CLIPTextModel):
    return kind(CLIPTextConfig(hidden_size=width, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
                               vocab_size=10, projection_dim=8, bos_token_id=0, eos_token_id=1))  # fmt: skip


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Conv2d(8, 16, 3), nn.Linear(64, 32)


MODELS = {
    "unet": unet,
    "sd15": lambda: unet(use_linear_projection=False, addition_embed_type=None, down_block_types=ATTENTION_BLOCKS["down_block_types"][::-1],
                         up_block_types=ATTENTION_BLOCKS["up_block_types"][::-1]),
    "flux": flux,
    "te": text_encoder,
    "te2": lambda: text_encoder(12, 3, CLIPTextModelWithProjection),
}  # fmt: skip


@functools.cache
def table_of(name):
    with torch.device("meta"):
        return module_table(MODELS[name]())


def weights(table, *ends):
    """Path -> shape of the linear and convolution weights, of those that end so."""
    found = {r.path: r.parameters["weight"] for r in table.records if len(r.parameters.get("weight", ())) > 1}
    return {path: shape for path, shape in found.items() if not ends or path.endswith(ends)}


def factors(table, *ends, ranks=(2,), seed=0):
    """Path -> (A, B); ranks in turn."""
    random, made = torch.Generator().manual_seed(seed), {}
    for i, (path, (out, features, *kernel)) in enumerate(weights(table, *ends).items()):
        r = ranks[i % len(ranks)]
        made[path] = (
            torch.randn(r, features, *kernel, generator=random),
            torch.randn(out, r, *(1 for _ in kernel), generator=random),
        )
    return made


# How a format names them


def named(adapter, name, down="lora_A.weight", up="lora_B.weight"):
    """A file's tensors; name: path -> how a key begins."""
    return {f"{name(path)}{end}": t for path, pair in adapter.items() for end, t in zip((down, up), pair, strict=True)}


def peft_keys(adapter):
    return named(adapter, lambda path: f"{PREFIX}{path}.")


def flat(prefix):
    return lambda path: f"{prefix}{path.replace('.', '_')}."


# What is read


def read(tensors, table, folder, metadata=None):
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, folder / "file.safetensors", metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, found = read_adapter(folder / "file.safetensors", table)
    match_tensors(make_plan(table, "x", config), found, where="file")
    return config, found


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)


def scales(table, config):
    return {p.target.path: p.rule.scaling(p.target, config) for p in make_plan(table, "x", config).placements}
