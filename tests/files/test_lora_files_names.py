"""Stable Diffusion's and Flux's own names in LoRA files: they mean what diffusers' converters make of them."""

import pytest
import torch
from lora_files import KOHYA, factors, flux, named, peft_keys, read, same, scales, table_of, weights

from peft_fx.planning.modules import module_table
from peft_fx.planning.plan import PREFIX

pytest.importorskip("diffusers")
from diffusers.loaders import lora_conversion_utils as theirs
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

pytestmark = pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")

SDXL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_transformer_blocks_1_attn1_to_out_0": "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0",
    "input_blocks_5_1_proj_in": "down_blocks.1.attentions.1.proj_in",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_transformer_blocks_0_attn2_to_k": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_0_out_layers_3": "up_blocks.1.resnets.2.conv2",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}


def renamed(adapter, names):
    """kohya's file under other names, with an alpha for each module, all different."""
    tensors = {}
    for i, (name, path) in enumerate(names.items()):
        tensors |= named({path: adapter[path]}, lambda _, name=name: f"lora_unet_{name}.", *KOHYA)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(i + 0.5)
    return tensors


def test_stable_diffusions_own_names_mean_what_diffusers_makes_of_them(tmp_path):
    table, adapter = table_of("unet"), factors(table_of("unet"), ranks=(2, 3))
    tensors = renamed(adapter, SDXL)
    config, found = read(tensors, table, tmp_path)
    same(found, peft_keys({path: adapter[path] for path in SDXL.values()}))
    ranks = {path: len(adapter[path][0]) for path in SDXL.values()}
    assert scales(table, config) == {path: (i + 0.5) / ranks[path] for i, path in enumerate(SDXL.values())}
    blocks = type("Config", (), {"layers_per_block": 2})
    converted, alphas = theirs._convert_non_diffusers_lora_to_diffusers(
        theirs._maybe_map_sgm_blocks_to_diffusers(dict(tensors), blocks)
    )
    same(
        found, {f"{PREFIX}{k.removeprefix('unet.')}": t for k, t in convert_unet_state_dict_to_peft(converted).items()}
    )
    assert sorted(alphas.values()) == [i + 0.5 for i in range(len(SDXL))]


def test_the_upsampler_of_a_block_without_attention_has_the_next_number(tmp_path):
    adapter = factors(table_of("sd15"))
    names = {
        "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_1_proj_in": "up_blocks.1.attentions.0.proj_in",
    }
    _, found = read(renamed(adapter, names), table_of("sd15"), tmp_path)
    same(found, peft_keys({path: adapter[path] for path in names.values()}))


def test_every_module_of_a_unet_has_a_name_of_stable_diffusions_own():
    from peft_fx.files.names import sgm_names

    for model in ("unet", "sd15"):
        assert {p for _, place in sgm_names(table_of(model)) for p in place.paths} >= weights(table_of(model)).keys()


FLUX = {
    "double_blocks_1_img_attn_qkv": "transformer_blocks.1.attn.to_q transformer_blocks.1.attn.to_k transformer_blocks.1.attn.to_v",
    "double_blocks_0_txt_attn_qkv": "transformer_blocks.0.attn.add_q_proj transformer_blocks.0.attn.add_k_proj transformer_blocks.0.attn.add_v_proj",
    "double_blocks_0_img_attn_proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks_0_txt_attn_proj": "transformer_blocks.0.attn.to_add_out",
    "double_blocks_0_img_mlp_0": "transformer_blocks.0.ff.net.0.proj",
    "double_blocks_0_img_mlp_2": "transformer_blocks.0.ff.net.2",
    "double_blocks_0_txt_mlp_0": "transformer_blocks.0.ff_context.net.0.proj",
    "double_blocks_0_txt_mlp_2": "transformer_blocks.0.ff_context.net.2",
    "double_blocks_0_img_mod_lin": "transformer_blocks.0.norm1.linear",
    "double_blocks_0_txt_mod_lin": "transformer_blocks.0.norm1_context.linear",
    "single_blocks_1_linear1": "single_transformer_blocks.1.attn.to_q single_transformer_blocks.1.attn.to_k single_transformer_blocks.1.attn.to_v "
                               "single_transformer_blocks.1.proj_mlp",
    "single_blocks_0_linear2": "single_transformer_blocks.0.proj_out",
    "single_blocks_0_modulation_lin": "single_transformer_blocks.0.norm.linear",
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1", "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1", "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1", "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out", "final_layer_adaLN_modulation_1": "norm_out.linear",
}  # fmt: skip


def flux_file(table, alpha=None):
    """(file, PEFT's keys -> tensors): rank 2, weights that Flux has in one piece too."""
    adapter, tensors, expected = factors(table), {}, {}
    for name, paths in FLUX.items():
        A = adapter[paths.split()[0]][0]
        B = [adapter[path][1] for path in paths.split()]
        expected |= peft_keys({path: (A, b) for path, b in zip(paths.split(), B, strict=True)})
        B = torch.cat(B)
        B = torch.cat(B.chunk(2)[::-1]) if "adaLN" in name else B
        tensors |= {f"lora_unet_{name}.lora_down.weight": A, f"lora_unet_{name}.lora_up.weight": B}
        if alpha is not None:
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return tensors, expected


def test_fluxs_own_names_and_weights_are_cut(tmp_path):
    tensors, expected = flux_file(table_of("flux"), alpha=1.0)
    config, found = read(tensors, table_of("flux"), tmp_path)
    same(found, expected)
    assert set(scales(table_of("flux"), config).values()) == {0.5} and len(expected) == 2 * sum(
        len(v.split()) for v in FLUX.values()
    )
    with_dots = {
        k.replace("lora_unet_", "diffusion_model.").replace("attn_qkv", "attn.qkv"): t for k, t in tensors.items()
    }
    same(read(with_dots, table_of("flux"), tmp_path)[1], expected)


def test_fluxs_own_names_mean_what_diffusers_makes_of_them(tmp_path):
    """Its converter knows the sizes of the published model only."""
    with torch.device("meta"):
        table = module_table(flux(num_attention_heads=24, attention_head_dim=128))
    tensors, expected = flux_file(table)
    _, found = read(tensors, table, tmp_path)
    same(found, expected)
    converted = theirs._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    same(found, {f"{PREFIX}{k.removeprefix('transformer.')}": t for k, t in converted.items()})
