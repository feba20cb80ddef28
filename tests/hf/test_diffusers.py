"""diffusers' models, captured, adapted, swapped and merged: what they give is what PEFT gives."""

import copy

import peft
import pytest
import torch
from diffusion import close, flux, kohya, unet
from safetensors.torch import save_file

import peft_fx

diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import lora_conversion_utils as theirs  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")]


MODELS = {"unet": unet, "flux": flux}
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_shortcut", "proj_in", "ff.net.0.proj", "time_emb_proj", "conv_in",
             "downsamplers.0.conv", "upsamplers.0.conv"],
    "flux": ["to_q", "to_v", "to_add_out", "add_k_proj", "norm1.linear", "proj_mlp", "proj_out", "timestep_embedder.linear_1"],
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def captured(request):
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    model.eval()
    return request.param, model, inputs, peft_fx.capture(model, kwargs=inputs)


def config(name, **options):
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 12,
        "target_modules": TARGETS[name],
        "init_lora_weights": False,
        **options,
    }


def reference(model, name, folder, seed=0, **options):
    """PEFT's model, and a folder with its adapter."""
    torch.manual_seed(seed)
    given = {k: v for k, v in config(name, **options).items() if k != "peft_type"}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**given))
    adapted.save_pretrained(folder)
    return adapted


def gradients(parameters, output):
    """Of a sum that weighs every number differently."""
    loss = (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum()
    return torch.autograd.grad(loss, parameters)


def test_a_captured_model_gives_what_the_model_gives(captured):
    _, model, inputs, graph = captured
    assert not graph.peft_fx.mode.locked and type(graph(**inputs)) is type(model(**inputs))
    assert torch.equal(graph(**inputs).sample, model(**inputs).sample)
    fewer = {k: v[:1] if len(v) == 2 else v for k, v in inputs.items()}
    close(graph(**fewer).sample, model(**fewer).sample)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_outputs_gradients_and_merged_weights_are_pefts(captured, tmp_path, options):
    name, model, inputs, graph = captured
    expected = reference(model, name, tmp_path, **options)
    tuned = peft_fx.load_adapter(graph, tmp_path, trainable=True)
    close(tuned(**inputs).sample, expected(**inputs).sample)
    assert (tuned(**inputs).sample - model(**inputs).sample).abs().max() > 0.01
    keys = [k for k, p in expected.named_parameters() if p.requires_grad]
    theirs = gradients([p for p in expected.parameters() if p.requires_grad], expected(**inputs).sample)
    paths = [k.removeprefix("base_model.model.").replace(".default", "") for k in keys]
    parts = [(path.split(".lora_")[0], f"lora_{path.split('.lora_')[1].split('.')[0]}") for path in paths]
    ours = gradients(
        [tuned.get_parameter(f"peft_fx.adapters.default.{m}.on_weight.{t}") for m, t in parts], tuned(**inputs).sample
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    merged, plain = peft_fx.merge(tuned), expected.merge_and_unload()
    for key, weight in plain.state_dict().items():
        close(merged.get_parameter(key) if key in dict(merged.named_parameters()) else merged.get_buffer(key), weight)
    close(merged(**inputs).sample, plain(**inputs).sample)
    back = peft_fx.unmerge(merged)
    assert torch.equal(back(**inputs).sample, tuned(**inputs).sample)
    assert all(
        torch.equal(p, dict(graph.named_parameters())[k]) for k, p in back.named_parameters() if "peft_fx" not in k
    )


def test_a_swap_compiles_nothing(captured, tmp_path):
    name, model, inputs, graph = captured
    reference(model, name, tmp_path / "first")
    expected = reference(model, name, tmp_path / "second", seed=1, lora_alpha=3)
    compiled = torch.compile(peft_fx.load_adapter(graph, tmp_path / "first"), backend="eager")
    before = compiled(**inputs).sample
    with torch.compiler.set_stance("fail_on_recompile"):
        peft_fx.hotswap(compiled, tmp_path / "second")
        close(compiled(**inputs).sample, expected(**inputs).sample)
    assert (compiled(**inputs).sample - before).abs().max() > 0.01


@pytest.mark.parametrize(
    "convolutions", [(), ("conv1", "conv2", "proj_in", "downsamplers.0.conv")], ids=["linear", "convolutions"]
)
def test_a_file_of_kohyas_is_loaded_swapped_and_gives_what_diffusers_gives(captured, tmp_path, convolutions):
    name, model, inputs, graph = captured
    torch.manual_seed(2)
    files = [kohya(model, name, convolutions) for _ in range(2)]
    for i, tensors in enumerate(files):
        save_file(tensors, tmp_path / f"{i}.safetensors")
    expected = []
    for tensors in files:
        base = copy.deepcopy(model)
        if name == "unet":
            converted, alphas = theirs._convert_non_diffusers_lora_to_diffusers(dict(tensors))
            base.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
        else:
            base.load_lora_adapter(theirs._convert_kohya_flux_lora_to_diffusers(dict(tensors)), prefix="transformer")
        expected.append(base(**inputs).sample)
    tuned = peft_fx.load_adapter(graph, tmp_path / "0.safetensors")
    close(tuned(**inputs).sample, expected[0])
    report = peft_fx.hotswap(tuned, tmp_path / "1.safetensors")
    assert report.source.endswith("1.safetensors") and not report.zeroed
    close(tuned(**inputs).sample, expected[1])
    assert (expected[1] - expected[0]).abs().max() > 0.01
    peft_fx.save_adapter(tuned, tmp_path / "saved")
    saved = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "saved")
    close(saved(**inputs).sample, expected[1])


def test_what_diffusers_saves_is_loaded(captured, tmp_path):
    """Its file has keys without a component, and the config in its metadata."""
    name, model, inputs, graph = captured
    saved = copy.deepcopy(model)
    saved.add_adapter(peft.LoraConfig(**{k: v for k, v in config(name).items() if k != "peft_type"}))
    saved.save_lora_adapter(tmp_path)
    tuned = peft_fx.load_adapter(graph, tmp_path)
    close(tuned(**inputs).sample, saved(**inputs).sample)
    assert tuned.meta["peft_fx"].recipe["default"].config.lora_alpha == 12


@pytest.mark.parametrize("name", MODELS)
def test_a_peft_model_gives_pefts_outputs_and_gradients(fresh_dynamo, name, tmp_path):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    expected = reference(model.eval(), name, tmp_path)
    given = peft_fx.LoraConfig(**{k: v for k, v in config(name).items() if k != "peft_type"})
    tuned = peft_fx.get_peft_model(copy.deepcopy(model), given)
    peft_fx.set_peft_model_state_dict(tuned, peft.get_peft_model_state_dict(expected))
    found = tuned(**inputs)
    assert type(found) is type(model(**inputs))
    close(found.sample, expected(**inputs).sample)
    ours, theirs = ([(n, p) for n, p in m.named_parameters() if p.requires_grad] for m in (tuned, expected))
    ours = {n.partition("adapters.default.")[2].replace(".on_weight.lora_", ".lora_"): p for n, p in ours}
    theirs = {n.removeprefix("base_model.model.").replace(".default.weight", ""): p for n, p in theirs}
    assert ours.keys() == theirs.keys()
    found, wanted = (
        gradients([own[n] for n in sorted(own)], m(**inputs).sample) for own, m in ((ours, tuned), (theirs, expected))
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
