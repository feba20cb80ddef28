"""Checkpoints packed by hand, read by transformers' `from_pretrained` with no package that wrote them."""

import copy
import json

import handpacked
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.quantizers import auto

from peft_fx.errors import StorageError
from peft_fx.storage.native.base import installed
from peft_fx.storage.native.layers import LAYERS, layer
from peft_fx.storage.native.loading import native_layers
from peft_fx.storage.recognise import recognise
from peft_fx.storage.schemes import scheme

IDS = torch.tensor([[1, 5, 9, 3, 2], [7, 7, 0, 4, 6]])
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": False,
    "checkpoint_format": "gptq",
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
AQLM = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 8,
        "linear_weights_not_to_quantize": ["lm_head.weight"]}  # fmt: skip
EETQ = {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": ["lm_head"]}


def hqq_config(bits=4, axis=1):
    weight = {
        "nbits": bits,
        "group_size": 32,
        "axis": axis,
        "channel_wise": True,
        "optimize": True,
        "round_zero": False,
        "view_as_float": False,
    }
    return {"quant_method": "hqq", "skip_modules": ["lm_head"], "quant_config": {
        "weight_quant_params": weight, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}}  # fmt: skip


def with_options(hand, bits=4, axis=1, dtype="torch.float16"):
    """What hqq writes beside the numbers: options of the layer, texts as bytes."""
    packing = f"{bits}bit_{'32' if bits == 3 else 'u8'}"
    texts = {
        "packing": packing,
        "unpack_view_dtype": f"torch.{'int32' if bits == 3 else 'uint8'}",
        "compute_dtype": dtype,
    }
    flags = {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "encoded_state_dict": 1,
             "stores_quant_config": 1, "channel_wise": 1, "optimize": 1, "round_zero": 0}  # fmt: skip
    hand.tensors |= {name: torch.tensor([ord(c) for c in text], dtype=torch.uint8) for name, text in texts.items()}
    hand.tensors |= {name: torch.tensor(flag, dtype=torch.uint8) for name, flag in flags.items()}
    hand.tensors |= {
        name: torch.tensor(v, dtype=torch.int32) for name, v in (("nbits", bits), ("group_size", 32), ("axis", axis))
    }
    hand.tensors["shape"] = torch.tensor(hand.W.shape)
    return hand


def as_floats(hand):
    hand.tensors |= {
        "W_q": hand.tensors["W_q"].view(torch.float16),
        "view_as_float": torch.tensor(1, dtype=torch.uint8),
    }
    return hand


def compressor(out, inp, *, bits=4, **more):
    hand = handpacked.inc(out, inp, bits=bits, **more)
    hand.tensors |= {"scale_bf16_to_fp8": torch.zeros(1, dtype=torch.bfloat16), "bias": torch.randn(out).half()}
    del hand.tensors["g_idx"]
    return hand


CHECKPOINTS = {
    "gptq": (GPTQ, handpacked.gptq),
    "gptq 3 bits v2 in any order": (GPTQ | {"bits": 3, "checkpoint_format": "gptq_v2", "desc_act": True},
                                    lambda *n, **k: handpacked.gptq(*n, bits=3, version=2, order=True, **k)),
    "gptq 8 bits": (GPTQ | {"bits": 8}, lambda *n, **k: handpacked.gptq(*n, bits=8, **k)),
    "neural compressor": (GPTQ, compressor),
    "neural compressor 3 bits": (GPTQ | {"bits": 3}, lambda *n, **k: compressor(*n, bits=3, **k)),
    "awq": (AWQ, handpacked.awq),
    "awq 8 bits": (AWQ | {"bits": 8}, lambda *n, **k: handpacked.awq(*n, bits=8, **k)),
    "hqq": (hqq_config(), lambda *n, **k: with_options(handpacked.hqq(*n, dtype=torch.float16, **k))),
    "hqq 3 bits axis 0 for bfloat16": (hqq_config(3, 0), lambda *n, **k: with_options(
        handpacked.hqq(*n, bits=3, axis=0, dtype=torch.bfloat16, **k), 3, 0, "torch.bfloat16")),
    "hqq seen as floats": (hqq_config(), lambda *n, **k: as_floats(with_options(handpacked.hqq(*n, dtype=torch.float16, **k)))),
    "aqlm": (AQLM, handpacked.aqlm),
    "eetq": (EETQ, handpacked.eetq),
}  # fmt: skip
each = pytest.mark.parametrize("name", CHECKPOINTS)


def small():
    torch.manual_seed(0)
    return tiny.llama(hidden_size=64, intermediate_size=128, attention_bias=True).eval()


def linears(model):
    return [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and path != "lm_head"]


def write(folder, config, pack, chosen=lambda path: True, change=lambda tensors: tensors):
    """Writes a checkpoint; returns the dense model with the numbers that the format defines, and what was written."""
    model = small()
    tensors, dense = dict(model.state_dict()), {}
    for seed, path in enumerate(filter(chosen, linears(model))):
        del tensors[f"{path}.weight"]
        hand = pack(*model.get_submodule(path).weight.shape, seed=seed)
        dense[f"{path}.weight"] = hand.W.float()
        if "bias" in hand.tensors:
            dense[f"{path}.bias"] = hand.tensors["bias"].float()
            model.get_submodule(path).bias = torch.nn.Parameter(torch.empty_like(dense[f"{path}.bias"]))
        tensors |= {f"{path}.{name}": t for name, t in hand.tensors.items()}
    model.load_state_dict(dense, strict=False)
    tensors = change({name: t.contiguous() for name, t in tensors.items()})
    model.config.save_pretrained(folder)
    data = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(data))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model, tensors


def load(folder, **options):
    with native_layers(always=True):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@each
def test_logits_and_gradients_are_those_of_the_dense_weights(tmp_path, name):
    reference, _ = write(tmp_path, *CHECKPOINTS[name])
    model = load(tmp_path)
    kinds = {type(model.get_submodule(path)) for path in linears(reference)}
    assert len(kinds) == 1 and issubclass(*kinds, torch.nn.Module) and type(model.lm_head) is torch.nn.Linear
    assert not model.training and next(iter(kinds)).__name__.endswith("Linear")
    for path in linears(reference):  # the weight as its type rounds it
        held = recognise(model.get_submodule(path))
        torch.testing.assert_close(held.dense().double(), reference.get_submodule(path).weight.double(),
                                   rtol=3 * torch.finfo(held.dtype).eps, atol=3e-2 * torch.finfo(held.dtype).eps)  # fmt: skip
        reference.get_submodule(path).weight.data.copy_(held.dense())
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-6, atol=1e-6)
    grads = []
    for m in (model, reference):
        embedded = m.get_input_embeddings()(IDS).detach().requires_grad_()
        grads += torch.autograd.grad(m(inputs_embeds=embedded).logits.square().sum(), embedded)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@each
def test_the_state_dict_is_the_files_and_a_save_writes_it_again(tmp_path, name):
    config, pack = CHECKPOINTS[name]
    _, tensors = write(tmp_path, config, pack)
    model = load(tmp_path)
    model.save_pretrained(tmp_path / "again")
    for found in (model.state_dict(), load_file(tmp_path / "again" / "model.safetensors")):
        assert found.keys() == tensors.keys()
        for key, t in tensors.items():
            assert found[key].dtype == t.dtype and found[key].shape == t.shape, key
            assert bytes(found[key].reshape(-1).view(torch.uint8)) == bytes(t.reshape(-1).view(torch.uint8)), key
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written == config
    assert torch.equal(load(tmp_path / "again")(IDS).logits, model(IDS).logits)


@each
def test_copies_state_dicts_and_casts(tmp_path, name):
    write(tmp_path, *CHECKPOINTS[name])
    model = load(tmp_path)
    path = linears(small())[0]
    held = model.get_submodule(path)
    x = torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(held)(x), held(x))
    other = model.get_submodule(linears(small())[1])  # of other numbers
    if held.in_features == other.in_features and held.out_features == other.out_features:
        other.load_state_dict(held.state_dict())
        assert torch.equal(other(x), held(x))
    half = copy.deepcopy(held).to(torch.float64)
    y = half(x.double())
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), held(x), rtol=1e-2, atol=1e-2)


@each
def test_other_numbers_are_placed_and_taken_back(tmp_path, name):
    write(tmp_path, *CHECKPOINTS[name])
    held = load(tmp_path).get_submodule(linears(small())[0])
    before, now = dict(held._buffers), recognise(held)
    storage = scheme(now.format.scheme)
    if name == "aqlm":
        with pytest.raises(StorageError, match="merge with storage='dense'"):
            storage.quantize(now.dense(), now)
        return
    new = now.again(storage.quantize(now.dense().float() * 0.5, now))
    undo = storage.place(held, "weight", new)
    assert torch.equal(recognise(held).dense(), new.dense()) and not torch.equal(new.dense(), now.dense())
    undo()
    assert all(held._buffers[key] is t for key, t in before.items()) and before.keys() == held._buffers.keys()


def test_recognised_is_the_weight_alone(tmp_path):
    write(tmp_path, *CHECKPOINTS["gptq"])
    held = load(tmp_path).get_submodule(linears(small())[0])
    assert recognise(held, "bias") is None
    assert recognise(held).tensors["qweight"] is held.qweight


# what the config says


def test_modules_that_awq_does_not_convert_stay_dense(tmp_path):
    config = AWQ | {"modules_to_not_convert": ["self_attn.q_proj", "model.layers.1"]}
    reference, _ = write(tmp_path, config, handpacked.awq, lambda path: "q_proj" not in path and "layers.1" not in path)
    model = load(tmp_path)
    assert {path for path in linears(model)} == {
        path for path in linears(reference) if "q_proj" in path or "layers.1" in path
    }
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-2, atol=1e-3)


def test_modules_in_block_to_quantize_of_gptq(tmp_path):
    config = GPTQ | {"modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]]}
    chosen = lambda path: path.split(".")[-1] in ("k_proj", "v_proj", "down_proj")  # noqa: E731
    write(tmp_path, config, handpacked.gptq, chosen)
    model = load(tmp_path)
    assert {path for path in linears(small()) if path not in linears(model)} == set(filter(chosen, linears(small())))


def test_options_of_hqq_by_layer(tmp_path):
    both = {4: hqq_config(4)["quant_config"], 2: hqq_config(2)["quant_config"]}
    config = hqq_config() | {"quant_config": {"self_attn.q_proj": both[4], "mlp.up_proj": both[2]}}

    def pack(out, inp, seed):
        bits = 4 if out == 64 else 2
        return with_options(handpacked.hqq(out, inp, bits=bits, dtype=torch.float16, seed=seed), bits)

    chosen = lambda path: path.endswith(("q_proj", "up_proj"))  # noqa: E731
    reference, _ = write(tmp_path, config, pack, chosen)
    model = load(tmp_path)
    assert {path for path in linears(small()) if path not in linears(model)} == set(filter(chosen, linears(small())))
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-2, atol=1e-3)


def test_a_checkpoint_of_gptq_without_order(tmp_path):
    """Older ones have no g_idx: groups lie in order, and nothing is added to the state dict."""
    reference, tensors = write(
        tmp_path, *CHECKPOINTS["gptq"], change=lambda ts: {n: t for n, t in ts.items() if "g_idx" not in n}
    )
    model = load(tmp_path)
    assert model.state_dict().keys() == tensors.keys()
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-2, atol=1e-3)


def test_a_config_that_the_user_passes_leaves_the_checkpoints(tmp_path):
    write(tmp_path, *CHECKPOINTS["gptq"])
    model = load(tmp_path, quantization_config=GPTQConfig(bits=4, backend="torch"))
    assert type(model.get_submodule(linears(small())[0])).__name__ == "GPTQLinear"


# what is refused


@pytest.mark.parametrize("name, change, said", [
    ("gptq", {"bits": 5}, "bits=5"),
    ("gptq", {"checkpoint_format": "marlin"}, "format 'marlin'"),
    ("gptq", {"dynamic": {"+:.*q_proj": {"bits": 8}}}, "rules for single layers"),
    ("gptq", {"bits": 8}, r"14 of 14 layers: model.layers.0.self_attn.q_proj: qweight of shape \(8, 64\), where the config makes it \(16, 64\)"),
    ("gptq", {"group_size": 64}, r"qzeros of shape \(2, 8\), where"),
    ("gptq", {"modules_in_block_to_quantize": [["q_proj"]]}, "14 packed weights and the model 2 linear layers"),
    ("awq", {"version": "gemv"}, "version 'gemv'"),
    ("awq", {"bits": 5}, "bits=5"),
    ("awq", {"group_size": 48}, "groups must fill it"),
    ("aqlm", {"in_group_size": 16}, "codes of shape"),
    ("aqlm", {"nbits_per_codebook": 20}, "up to 16 bits"),
    ("eetq", {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp"]}, "there is no place for model.layers.0.mlp"),
    ("hqq", hqq_config(2), r"W_q of shape"),
    ("hqq", hqq_config(7), "nbits=7"),
    ("hqq", {"quant_config": hqq_config()["quant_config"] | {"offload_meta": True}}, "offloaded"),
])  # fmt: skip
def test_a_config_that_does_not_fit(tmp_path, name, change, said):
    config, pack = CHECKPOINTS[name]
    write(tmp_path, config, pack)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"quantization_config": config | change}))
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    with pytest.raises(StorageError, match=said):
        load(tmp_path)
    assert before == auto.AUTO_QUANTIZER_MAPPING


def test_missing_tensors_are_refused(tmp_path):
    write(
        tmp_path,
        *CHECKPOINTS["awq"],
        change=lambda ts: {n: t for n, t in ts.items() if n != "model.layers.1.mlp.up_proj.qzeros"},
    )
    with pytest.raises(StorageError, match="model.layers.1.mlp.up_proj has no qzeros"):
        load(tmp_path)


def test_words_of_another_type_are_refused(tmp_path):
    write(
        tmp_path,
        *CHECKPOINTS["awq"],
        change=lambda ts: {n: t.long() if n.endswith("qzeros") else t for n, t in ts.items()},
    )
    with pytest.raises(StorageError, match="qzeros of torch.int64, where the format has torch.int32"):
        load(tmp_path)


def test_awq_that_scales_activations_is_refused(tmp_path):
    write(tmp_path, *CHECKPOINTS["awq"], change=lambda ts: ts | {"model.layers.0.mlp.act.scales": torch.ones(4)})
    with pytest.raises(StorageError, match="scales activations"):
        load(tmp_path)


def test_hqq_for_a_type_that_is_none_is_refused(tmp_path):
    def change(tensors):
        bad = torch.tensor([ord(c) for c in "__import__('os')"], dtype=torch.uint8)
        return {n: bad.clone() if n.endswith("compute_dtype") else t for n, t in tensors.items()}

    write(tmp_path, *CHECKPOINTS["hqq"], change=change)
    with pytest.raises(StorageError, match="for .__import__"):
        load(tmp_path)


def test_nothing_is_quantized_on_the_way(tmp_path):
    small().save_pretrained(tmp_path)
    with native_layers(always=True), pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GPTQConfig(bits=4))


# transformers' tables


def test_the_tables_are_what_they_were_afterwards():
    tables = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    before = [dict(table) for table in tables]
    with pytest.raises(KeyError), native_layers(always=True):
        changed = [
            {key for key in table if table[key] is not old[key]} for table, old in zip(tables, before, strict=True)
        ]
        assert changed == [LAYERS.keys()] * 2
        raise KeyError
    assert [dict(table) for table in tables] == before


def test_methods_whose_package_is_here_are_left_to_it(monkeypatch):
    monkeypatch.setattr("peft_fx.storage.native.base.installed", {"aqlm", "hqq", "gptqmodel"}.__contains__)
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    with native_layers():  # optimum is missing for gptq; of hqq's checkpoints transformers makes random weights anyway
        changed = {key for key in before if auto.AUTO_QUANTIZER_MAPPING[key] is not before[key]}
    assert changed == LAYERS.keys() - {"aqlm", "awq"}


def test_a_package_is_what_is_installed():
    assert installed("safetensors") and not installed("peft_fx_has_no_such_package")


def test_every_layer_has_a_scheme_and_its_own_name():
    for method in LAYERS:
        chosen = layer(method)
        assert chosen.method == method and scheme(chosen.scheme).name == chosen.scheme
