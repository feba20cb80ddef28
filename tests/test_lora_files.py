"""LoRA files of other programs: the same adapter in each format gives the same tensors, bit for bit, and diffusers' own."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import peft_fx
from peft_fx.errors import AdapterFileError
from peft_fx.files import match_tensors, read_adapter
from peft_fx.planning.modules import module_table
from peft_fx.planning.plan import PREFIX, make_plan

diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import lora_conversion_utils as theirs  # noqa: E402
from diffusers.utils.state_dict_utils import (  # noqa: E402
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)

pytestmark = pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")

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


@pytest.fixture(scope="module")
def tables():
    with torch.device("meta"):
        models = {
            "unet": unet(),
            "flux": flux(),
            "te": text_encoder(),
            "te2": text_encoder(12, 3, CLIPTextModelWithProjection),
        }
        models["sd15"] = unet(use_linear_projection=False, addition_embed_type=None, down_block_types=ATTENTION_BLOCKS["down_block_types"][::-1],
                              up_block_types=ATTENTION_BLOCKS["up_block_types"][::-1])  # fmt: skip
        return {name: module_table(model) for name, model in models.items()}


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


def named(adapter, name, down="lora_A.weight", up="lora_B.weight"):
    """A file's tensors; name: path -> how a key begins."""
    return {f"{name(path)}{end}": t for path, pair in adapter.items() for end, t in zip((down, up), pair, strict=True)}


def peft_keys(adapter):
    return named(adapter, lambda path: f"{PREFIX}{path}.")


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


# The formats


def flat(prefix):
    return lambda path: f"{prefix}{path.replace('.', '_')}."


KOHYA = ("lora_down.weight", "lora_up.weight")
FORMATS = {
    "peft with a component": ("unet", (), lambda path: f"unet.{path}.", ()),
    "peft": ("unet", (), lambda path: f"{path}.", ()),
    "peft with the adapter's name": ("unet", (), lambda path: f"unet.{path}.", ("lora_A.default.weight", "lora_B.default.weight")),
    "diffusers": ("unet", (), lambda path: f"unet.{path}.", ("lora.down.weight", "lora.up.weight")),
    "kohya": ("unet", (), flat("lora_unet_"), KOHYA),
    "kohya, with dots": ("unet", (), lambda path: f"diffusion_model.{path}.", KOHYA),
    "flux, diffusers": ("flux", (), lambda path: f"transformer.{path}.", ()),
    "flux, underscores": ("flux", (), flat("lora_transformer_"), KOHYA),
    "text encoder": ("te", ("proj", "fc1", "fc2"), lambda path: f"text_encoder.text_model.{path}.", ()),
    "text encoder, diffusers": ("te", ("proj", "fc1", "fc2"), lambda path: f"text_encoder.text_model.{path}.",
                                ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
    "text encoder, kohya": ("te", ("proj", "fc1", "fc2"), flat("lora_te_text_model_"), KOHYA),
    "text encoder, kohya XL": ("te", ("proj", "fc1", "fc2"), flat("lora_te1_text_model_"), KOHYA),
    "second text encoder": ("te2", ("proj", "fc1", "text_projection"), flat("lora_te2_"), KOHYA),
}  # fmt: skip


@pytest.mark.parametrize("model, ends, name, pair", FORMATS.values(), ids=FORMATS)
def test_a_format_gives_the_same_tensors_bit_for_bit(tables, tmp_path, model, ends, name, pair):
    table, adapter = tables[model], factors(tables[model], *ends)
    config, found = read(named(adapter, name, *pair), table, tmp_path)
    same(found, peft_keys(adapter))
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (2, 2, {}, {})


def former(path):
    """diffusers' names from when LoRA sat in attention processors."""
    parent, _, child = path.removesuffix(".0").rpartition(".")
    return f"unet.{parent}.processor.{child}_"


def former_text(path):
    parent, _, child = path.rpartition(".")
    return f"text_encoder.text_model.{parent}.to_{child[0] if child != 'out_proj' else 'out'}_"


@pytest.mark.parametrize("model, name, ends, convert", [
    ("unet", former, ("to_q", "to_k", "to_v", "to_out.0"), convert_unet_state_dict_to_peft),
    ("te", former_text, ("_proj",), lambda tensors: convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))),
])  # fmt: skip
def test_diffusers_former_names_mean_what_diffusers_makes_of_them(tables, tmp_path, model, name, ends, convert):
    adapter = factors(tables[model], *ends)
    tensors = named(adapter, name, "lora.down.weight", "lora.up.weight")
    _, found = read(tensors, tables[model], tmp_path)
    same(found, peft_keys(adapter))
    prefix = "unet." if model == "unet" else "text_encoder.text_model."
    same(found, {f"{PREFIX}{k.removeprefix(prefix)}": t for k, t in convert(tensors).items()})


# Original names, against diffusers' converters

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


def test_stable_diffusions_own_names_mean_what_diffusers_makes_of_them(tables, tmp_path):
    table, adapter = tables["unet"], factors(tables["unet"], ranks=(2, 3))
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


def test_the_upsampler_of_a_block_without_attention_has_the_next_number(tables, tmp_path):
    adapter = factors(tables["sd15"])
    names = {
        "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_1_proj_in": "up_blocks.1.attentions.0.proj_in",
    }
    _, found = read(renamed(adapter, names), tables["sd15"], tmp_path)
    same(found, peft_keys({path: adapter[path] for path in names.values()}))


def test_every_module_of_a_unet_has_a_name_of_stable_diffusions_own(tables):
    from peft_fx.files.names import sgm_names

    for model in ("unet", "sd15"):
        assert {p for _, place in sgm_names(tables[model]) for p in place.paths} >= weights(tables[model]).keys()


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


def test_fluxs_own_names_and_weights_are_cut(tables, tmp_path):
    tensors, expected = flux_file(tables["flux"], alpha=1.0)
    config, found = read(tensors, tables["flux"], tmp_path)
    same(found, expected)
    assert set(scales(tables["flux"], config).values()) == {0.5} and len(expected) == 2 * sum(
        len(v.split()) for v in FLUX.values()
    )
    with_dots = {
        k.replace("lora_unet_", "diffusion_model.").replace("attn_qkv", "attn.qkv"): t for k, t in tensors.items()
    }
    same(read(with_dots, tables["flux"], tmp_path)[1], expected)


def test_fluxs_own_names_mean_what_diffusers_makes_of_them(tmp_path):
    """Its converter knows the sizes of the published model only."""
    with torch.device("meta"):
        table = module_table(flux(num_attention_heads=24, attention_head_dim=128))
    tensors, expected = flux_file(table)
    _, found = read(tensors, table, tmp_path)
    same(found, expected)
    converted = theirs._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    same(found, {f"{PREFIX}{k.removeprefix('transformer.')}": t for k, t in converted.items()})


# Scales


def test_ranks_and_alphas_may_differ_from_module_to_module(tables, tmp_path):
    table, adapter = tables["flux"], factors(tables["flux"], ranks=(2, 3, 2, 4))
    tensors = named(adapter, flat("lora_unet_"), *KOHYA)
    given = {path: i + 1.0 for i, path in enumerate(adapter) if i % 3}
    tensors |= {f"{flat('lora_unet_')(path)}alpha": torch.tensor(a, dtype=torch.bfloat16) for path, a in given.items()}
    config, found = read(tensors, table, tmp_path)
    same(found, peft_keys(adapter))
    ranks = {path: len(A) for path, (A, _) in adapter.items()}
    assert scales(table, config) == {path: given.get(path, r) / r for path, r in ranks.items()}


def test_a_path_that_is_the_end_of_another_chooses_that_module_alone(tables, tmp_path):
    adapter = {path: pair for path, pair in factors(tables["flux"]).items() if path in ("proj_out", "x_embedder")}
    config, found = read(named(adapter, lambda path: f"transformer.{path}."), tables["flux"], tmp_path)
    assert len(make_plan(tables["flux"], "x", config).targets) == 2
    same(found, peft_keys(adapter))


def test_the_config_that_diffusers_writes_gives_the_scales(tables, tmp_path):
    adapter = factors(tables["unet"], "to_q", "to_k")
    written = {"r": 2, "lora_alpha": 6, "use_rslora": False, "target_modules": ["to_k", "to_q"], "alpha_pattern": {"to_k": 8},
               "peft_type": "LORA", "task_type": None}  # fmt: skip
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in written.items()})}
    config, found = read(named(adapter, lambda path: f"unet.{path}."), tables["unet"], tmp_path, metadata)
    same(found, peft_keys(adapter))
    assert all(s == (4 if path.endswith("to_k") else 3) for path, s in scales(tables["unet"], config).items())


def test_doras_magnitudes_and_biases_of_b(tables, tmp_path):
    adapter = factors(tables["sd15"], "to_q", "conv1")
    tensors, expected = named(adapter, flat("lora_unet_"), *KOHYA), peft_keys(adapter)
    for path, (_, B) in adapter.items():
        m = torch.rand(len(B))
        tensors[f"{flat('lora_unet_')(path)}dora_scale"] = m.reshape(-1, *(1 for _ in B.shape[1:]))
        expected[f"{PREFIX}{path}.lora_magnitude_vector"] = m if B.dim() == 2 else m.reshape(1, -1, 1, 1)
    config, found = read(tensors, tables["sd15"], tmp_path)
    assert config.use_dora
    same(found, expected)
    tensors = named(adapter, lambda path: f"{path}.") | {
        f"{path}.lora_B.bias": torch.rand(len(B)) for path, (_, B) in adapter.items()
    }
    assert read(tensors, tables["sd15"], tmp_path)[0].lora_bias


# LyCORIS


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Conv2d(8, 16, 3), nn.Linear(64, 32)


def lycoris_file(kind, **options):
    """(model, file, deltas): what LyCORIS's formulas add to each weight."""
    model, tensors, deltas = Small(), {}, {}
    for name, module in model.named_children():
        out, features = module.weight.shape[:2]
        kernel = module.weight.shape[2:]
        made, deltas[name] = kind(out, features, kernel, **options)
        tensors |= {f"lora_unet_{name}.{k}": t for k, t in made.items()}
    return model, tensors, deltas


def loha(out, features, kernel, tucker=False):
    r, alpha = 2, 3.0
    if tucker and kernel:
        parts = {
            f"hada_{n}": torch.randn(s)
            for i in "12"
            for n, s in ((f"t{i}", (r, r, *kernel)), (f"w{i}_a", (r, out)), (f"w{i}_b", (r, features)))
        }
        P = [
            torch.einsum("ijkl,jn,im->mnkl", parts[f"hada_t{i}"], parts[f"hada_w{i}_b"], parts[f"hada_w{i}_a"])
            for i in "12"
        ]
    else:
        n = features * kernel.numel()
        parts = {f"hada_{k}": torch.randn(s) for i in "12" for k, s in ((f"w{i}_a", (out, r)), (f"w{i}_b", (r, n)))}
        P = [parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in "12"]
    return parts | {"alpha": torch.tensor(alpha)}, alpha / r * (P[0] * P[1]).reshape(out, features, *kernel)


def lokr(out, features, kernel, whole=False, both=False):
    r, alpha, l, c = 1, 2.0, 4, 4
    k, d = out // l, features // c
    w1 = {"lokr_w1_a": torch.randn(l, r), "lokr_w1_b": torch.randn(r, c)} if both else {"lokr_w1": torch.randn(l, c)}
    w2 = (
        {"lokr_w2": torch.randn(k, d, *kernel)}
        if whole
        else {"lokr_w2_a": torch.randn(k, r), "lokr_w2_b": torch.randn(r, d * kernel.numel())}
    )
    W1 = w1["lokr_w1_a"] @ w1["lokr_w1_b"] if both else w1["lokr_w1"]
    W2 = w2["lokr_w2"].reshape(k, -1) if whole else w2["lokr_w2_a"] @ w2["lokr_w2_b"]
    delta = torch.einsum("lc,kde->lkcde", W1, W2.reshape(k, d, -1)).reshape(out, features, *kernel)
    return w1 | w2 | {"alpha": torch.tensor(alpha)}, delta * (1 if whole else alpha / r)


@pytest.mark.parametrize("kind, options", [(loha, {}), (loha, {"tucker": True}), (lokr, {}), (lokr, {"both": True}), (lokr, {"whole": True})],
                         ids=["loha", "loha with cores", "lokr", "lokr of three factors", "lokr of whole factors"])  # fmt: skip
def test_lycoris_files_add_what_lycoris_adds(tmp_path, kind, options):
    torch.manual_seed(0)
    model, tensors, deltas = lycoris_file(kind, **options)
    config, found = read(tensors, module_table(model), tmp_path)
    for p in make_plan(module_table(model), "x", config).placements:
        theta = {name: found[p.file_key(name)] for name, _, _ in p.saved()} | {
            "scaling": torch.tensor(p.rule.scaling(p.target, p.config))
        }
        W = torch.zeros(p.target.shape)
        torch.testing.assert_close(p.rule.weight(W, None, theta, p.target, p.config)[0], deltas[p.target.path])


# Which part of a pipeline


def test_the_part_for_the_model_is_taken_and_the_others_are_named(tables, tmp_path):
    parts = {"unet": ("unet", "lora_unet_"), "te": ("te", "lora_te1_text_model_"), "te2": ("te2", "lora_te2_")}
    adapters = {
        n: factors(tables[m], *(("q_proj", "fc1") if n != "unet" else ("to_q",)), seed=i)
        for i, (n, (m, _)) in enumerate(parts.items())
    }
    tensors = {k: t for n, (_, prefix) in parts.items() for k, t in named(adapters[n], flat(prefix), *KOHYA).items()}
    save_file(tensors, tmp_path / "all.safetensors")
    for n, (model, _) in parts.items():
        with pytest.warns(UserWarning, match="left out what is for other parts of a pipeline") as said:
            _, found = read_adapter(tmp_path / "all.safetensors", tables[model])
        same(found, peft_keys(adapters[n]))
        assert len(said) == 1 and ("denoiser" in str(said[0].message)) == (n != "unet")


def test_two_encoders_that_both_fit_are_refused(tables, tmp_path):
    adapter = factors(tables["te"], "q_proj")
    tensors = named(adapter, flat("lora_te1_text_model_"), *KOHYA) | named(
        adapter, flat("lora_te2_text_model_"), *KOHYA
    )
    with pytest.raises(AdapterFileError, match="text_encoder and text_encoder_2 both fit this model"):
        read(tensors, tables["te"], tmp_path)


def test_a_pipelines_modules_in_one_model_are_all_adapted(tmp_path):
    model = nn.ModuleDict({"unet": Small(), "text_encoder": Small()})
    table = module_table(model)
    adapter = factors(table)
    same(read(named(adapter, lambda path: f"{path}."), table, tmp_path)[1], peft_keys(adapter))


# Refusals

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"unet.{Q}.lora_A.weight": (2, 16), f"unet.{Q}.lora_B.weight": (16, 2)}
FLUX_QKV = "lora_unet_double_blocks_0_img_attn_qkv"
REFUSED = {
    "nothing": ("unet", {}, "it has no tensors"),
    "another model's": ("te", PAIR, "names no module of this CLIPTextModel; it has 1 module(s) of the denoiser"),
    "a module that is not there": ("unet", {**PAIR, f"unet.{Q}x.lora_A.weight": (2, 16)}, f"{Q}x (nearest module: {Q})"),
    "an unknown tensor": ("unet", {**PAIR, f"unet.{Q}.diff_b": (16,)}, f"unet.{Q}.diff_b"),
    "PEFT's keys": ("unet", {f"{PREFIX}{Q}.lora_A.weight": (2, 16)}, "give the folder with both files"),
    "a factor missing": ("unet", dict([next(iter(PAIR.items()))]), f"missing: {PREFIX}{Q}.lora_B.weight"),
    "another shape": ("unet", {**PAIR, f"unet.{Q}.lora_B.weight": (8, 2)}, "expected shape (16, 2), got (8, 2)"),
    "an alpha alone": ("unet", {f"unet.{Q}.alpha": ()}, "alphas alone"),
    "alphas": ("unet", {**PAIR, f"unet.{Q}.alpha": (2,)}, "expected alpha to be one finite number"),
    "no rank": ("unet", {f"unet.{Q}.lora_B.weight": (16, 2)}, "no factor that tells the rank"),
    "rank 0": ("unet", {f"unet.{Q}.lora_A.weight": (0, 16), f"unet.{Q}.lora_B.weight": (16, 0)}, "expected an integer from 1"),
    "twice": ("unet", {**PAIR, f"unet.{Q}.lora.down.weight": (2, 16)}, f"another lora_A.weight for module {Q}"),
    "two methods": ("unet", {**PAIR, f"unet.{Q}.hada_w1_a": (2, 16)}, "has LOHA and LORA"),
    "rows that cannot be cut": ("flux", {f"{FLUX_QKV}.lora_down.weight": (2, 8), f"{FLUX_QKV}.lora_up.weight": (23, 2)}, "expected 24 rows"),
    "a Kronecker product over three": ("flux", {f"{FLUX_QKV}.lokr_w1": (2, 2), f"{FLUX_QKV}.lokr_w2": (12, 4)}, "cannot be cut into one each"),
    "magnitudes of inputs": ("unet", {**PAIR, f"unet.{Q}.dora_scale": (1, 16)}, "not per input feature"),
    "no common factor": ("flux", {"lora_unet_x_embedder.lokr_w1": (8, 4), "lora_unet_x_embedder.lokr_w2": (1, 1),
                                  "lora_unet_context_embedder.lokr_w1": (4, 4), "lora_unet_context_embedder.lokr_w2": (2, 2)}, "no decompose_factor"),
}  # fmt: skip


@pytest.mark.parametrize("model, shapes, says", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_loaded_is_refused_with_the_reason(tables, tmp_path, model, shapes, says):
    with pytest.raises(AdapterFileError) as error:
        read({key: torch.ones(shape) for key, shape in shapes.items()}, tables[model], tmp_path)
    assert says in str(error.value) and "file" in str(error.value)


METADATA = [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[1]", "expected a JSON object"),
            (json.dumps({"unet.r": 10**9}), "from 1 to"), (json.dumps({"unet.surprise": 1}), "unknown config field 'surprise'")]  # fmt: skip


@pytest.mark.parametrize("text, says", METADATA, ids=[f"{i}-{says}" for i, (_, says) in enumerate(METADATA)])
def test_a_bad_config_in_the_metadata_is_refused(tables, tmp_path, text, says):
    with pytest.raises(AdapterFileError, match=says):
        read(
            {key: torch.ones(shape) for key, shape in PAIR.items()},
            tables["unet"],
            tmp_path,
            {"lora_adapter_metadata": text},
        )


def test_scales_that_a_file_gives_twice_are_refused(tables, tmp_path):
    tensors = {key: torch.ones(shape) for key, shape in PAIR.items()} | {f"unet.{Q}.alpha": torch.tensor(1.0)}
    with pytest.raises(AdapterFileError, match="has scales twice"):
        read(tensors, tables["unet"], tmp_path, {"lora_adapter_metadata": json.dumps({"unet.r": 2})})


def test_names_that_underscores_make_equal_are_refused(tmp_path):
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(4, 4)}), "a": nn.ModuleDict({"b_c": nn.Linear(4, 4)})})
    adapter = factors(module_table(model))
    with pytest.raises(AdapterFileError, match="names no module"):
        read(named(adapter, flat("lora_unet_"), *KOHYA), module_table(model), tmp_path)
    same(read(named(adapter, lambda path: f"unet.{path}."), module_table(model), tmp_path)[1], peft_keys(adapter))


# Where files lie


def test_a_folder_with_one_such_file_and_a_hub_id_are_read(tables, tmp_path, monkeypatch):
    adapter = factors(tables["unet"], "to_q")
    save_file(named(adapter, lambda path: f"unet.{path}."), tmp_path / "pytorch_lora_weights.safetensors")
    same(read_adapter(tmp_path, tables["unet"])[1], peft_keys(adapter))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, allow_patterns: str(tmp_path))
    same(read_adapter("org/lora", tables["unet"])[1], peft_keys(adapter))
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "mine.safetensors")
    same(read_adapter(tmp_path, tables["unet"])[1], peft_keys(adapter))
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        AdapterFileError, match="several .safetensors files, give one: mine.safetensors, other.safetensors"
    ):
        read_adapter(tmp_path, tables["unet"])


def test_pickles_damaged_files_and_links_out_of_a_folder_are_refused(tables, tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"")
    with pytest.raises(AdapterFileError, match="pickles are not opened"):
        read_adapter(tmp_path / "lora.bin", tables["unet"])
    (tmp_path / "lora.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterFileError, match="not a sound safetensors file"):
        read_adapter(tmp_path / "lora.safetensors", tables["unet"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.safetensors").symlink_to(tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFileError, match="outside its folder"):
        read_adapter(tmp_path / "folder", tables["unet"])


def test_an_adapter_folder_is_read_as_before(tmp_path):
    model = Small()
    graph = peft_fx.apply(
        peft_fx.capture(nn.Sequential(model.one), (torch.randn(3, 8),)), {"peft_type": "LORA", "target_modules": ["0"]}
    )
    peft_fx.save_adapter(graph, tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert read_adapter(tmp_path, module_table(nn.Sequential(model.one)))[0].r == 8
