"""The same seed gives PEFT's adapter, bit for bit, and leaves the generator as PEFT leaves it: the same losses follow."""

import copy

import conformance as c
import peft
import pytest
import torch
from methods import cells, label

import peft_fx

pytestmark = pytest.mark.slow

LIBRARIES = {peft: peft.PEFT_TYPE_TO_CONFIG_MAPPING, peft_fx: peft_fx.PEFT_TYPE_TO_CONFIG_MAPPING}
LORA, LAYER = {"peft_type": "LORA", "r": 4}, {"target_modules": ["layer"]}


def model_of(library, subject, options, dtype=torch.float32):
    options = copy.deepcopy(options)
    config = LIBRARIES[library][options.pop("peft_type")](**options)
    base = c.build(subject, dtype)
    torch.manual_seed(5)
    return c.quiet(library.get_peft_model, base, config)


def rows(subjects, *options, base=LORA, **more):
    return [({**base, **more, **o}, subject) for subject in subjects.split() for o in options]


LORA_CASES = [
    *rows("linear Conv1D conv1d conv2d conv2d_grouped conv3d", {}, {"init_lora_weights": "gaussian"},
          {"init_lora_weights": False}, {"lora_bias": True}, {"lora_bias": True, "init_lora_weights": False},
          {"r": 2, "use_rslora": True, "lora_dropout": 0.1}, **LAYER),
    *rows("linear Conv1D", {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "orthogonal", "r": 2}, **LAYER),
    *rows("embedding", {}, {"init_lora_weights": False}, {"init_lora_weights": "orthogonal"}, **LAYER),
    *rows("llama", {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "orthogonal", "use_dora": True},
          target_modules=["q_proj", "up_proj"]),
    *rows("tied_llama", {}, {"init_lora_weights": False}, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    *rows("mixtral", {}, {"init_lora_weights": False}, target_modules=["q_proj"],
          target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    *rows("mixtral", {}, {"init_lora_weights": "gaussian", "rank_pattern": {"down_proj": 2}}, target_modules="all-linear"),
    *rows("llama", {}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"use_dora": True},
          {"trainable_token_indices": [1, 2]}, target_modules="all-linear", rank_pattern={"q_proj": 2, ".*1.*v_proj": 7}),
    *rows("bert t5 gpt2 vit biased_llama", {}, target_modules="all-linear"),
    *rows("twice", {}, target_modules=["shared", "last"]),
    *rows("alias", {}, target_modules=["first", "second"]),
]  # fmt: skip
# What each method needs on the models below, besides targets.
NEEDS = {
    "ADALORA": {"total_step": 10, "init_r": 4}, "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 8}, "GRALORA": {"r": 4}, "IA3": {"feedforward_modules": []}, "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0}, "PSOFT": {"r": 4}, "RANDLORA": {"r": 4}, "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2}, "SUPERTUNING": {"sparsity": 0.9, "r": 4}, "VBLORA": {"num_vectors": 4, "vector_length": 8},
    "WAVEFT": {"n_frequency": 8},
}  # fmt: skip
NOT_LINEAR = {"LN_TUNING", "TRAINABLE_TOKENS"}
METHODS = sorted({cell[1]["peft_type"] for cell in cells("PEFT")} | {"LORA"})
ON_MODELS = [
    ({"peft_type": name, "target_modules": targets, **NEEDS.get(name, {})}, subject)
    for name in METHODS if name not in NOT_LINEAR
    for subject, targets in (("biased_llama", ["v_proj", "q_proj", "down_proj"]), ("bert", ["query", "dense"]))
]  # fmt: skip
MORE = [
    *rows("linear conv1d conv2d embedding Conv1D", {}, {"init_weights": False}, {"init_weights": "gaussian"},
          base={"peft_type": "HIRA", "r": 4}, **LAYER),
    *rows("linear conv2d", {}, {"init_lora_weights": False},
          base={"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 9}, **LAYER),
    *rows("linear conv2d Conv1D", {"init_ia3_weights": False}, base={"peft_type": "IA3", "feedforward_modules": []}, **LAYER),
    *rows("gpt2", *({"peft_type": m, **NEEDS.get(m, {})} for m in ("HIRA", "RANDLORA", "VBLORA", "VERA", "UNILORA", "IA3")),
          base={}, target_modules=["c_attn", "c_proj"]),
    *rows("wide", {"hybrid_r": 2}, {"init_weights": False}, base={"peft_type": "GRALORA", "r": 4}, **LAYER),
]  # fmt: skip
CASES = [(options, subject) for _, options, subject, *_ in cells("PEFT")] + LORA_CASES + ON_MODELS + MORE


# In half precision PEFT rounds what it drew through the base's dtype.
FIRST = list({options["peft_type"]: (options, subject) for options, subject in reversed(CASES)}.values())
HALF = [(*case, dtype) for dtype in (torch.bfloat16, torch.float16) for case in FIRST if case[0]["peft_type"] != "OSF"]
EVERYWHERE = rows("bert", {}, base={"peft_type": "LILY", "r": 4}, target_modules="all-linear")
ATTENTION = rows("attention", {}, target_modules=["attn"])
TIED = rows("tied_llama", {}, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)


def is_case(name, **wanted):
    """Whether options are of this method and say this."""
    return lambda options: all(options.get(k, "absent") == v for k, v in {"peft_type": name, **wanted}.items())


# (which options, the tensors that may differ by rounding, why)
ROUNDED = [
    (is_case("LORA", use_dora=True), "lora_magnitude_vector", "a norm, summed in another order"),
    (is_case("TINYLORA"), "tinylora_B", "W Aᵀ / S here, U sqrt(S) there: one decomposition of W less"),
]
ROUNDED_IN_HALF = [
    *ROUNDED,
    (is_case("TINYLORA"), "tinylora_A", "frozen, and kept in float32 here"),
    (is_case("DEFT"), "deft_R", "computed from the rounded P here"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# (which options, why tensors or the state differ)
EXCEPTIONS = [
    (is_case("ADAMSS", init_weights=None), "PEFT draws B_i between the sketches for A_i and A_i+1"),
    (is_case("HRA", apply_GS=True), "PEFT's equal pairs of columns leave Gram-Schmidt with rounding noise"),
    (is_case("LILY", init_weights=False), "PEFT draws the router before B; here what is shared is drawn first"),
    (is_case("LILY", target_modules="all-linear"), "here layers share by the last part of their names"),
    (is_case("GRALORA", init_weights=False, gralora_k="absent"), "PEFT draws A and B block by block"),
    (is_case("LORA", target_modules=["attn"]), "PEFT draws the output projection twice, before and after the input's"),
    (is_case("LORA", ensure_weight_tying=True), "PEFT initialises the shared factors again as those of the head"),
]


def name_of(case):
    model = "" if case[0].get("target_modules") == ["layer"] else "-model"
    return label((case[0]["peft_type"], *case)) + model + "".join(str(dtype)[5:] for dtype in case[2:])


def parameters(cases):
    for case in cases:
        reasons = [why for applies, why in EXCEPTIONS if applies(case[0])]
        marks = [pytest.mark.xfail(reason=why, strict=True, raises=AssertionError) for why in reasons]
        yield pytest.param(case, marks=marks, id=name_of(case))


def numbers(library, model):
    """PEFT's tensors and ours by key; of RandLoRA's shared ones, without the copies that PEFT has under each module."""
    found = c.quiet(library.get_peft_model_state_dict, model, save_embedding_layers=False)
    copied = (".randlora_A", ".randlora_B")
    return {key: t for key, t in found.items() if not (key.startswith("base_model.model.") and key.endswith(copied))}


def check(options, subject, dtype=torch.float32):
    expected_model, state = model_of(peft, subject, options, dtype), torch.get_rng_state()
    model, state_here = model_of(peft_fx, subject, options, dtype), torch.get_rng_state()
    expected, found = numbers(peft, expected_model), numbers(peft_fx, model)
    assert found.keys() == expected.keys()
    listed = ROUNDED if dtype == torch.float32 else ROUNDED_IN_HALF
    rounded = [suffix for applies, suffix, _ in listed if applies(options)]
    for key, tensor in expected.items():
        if any(suffix in key for suffix in rounded):
            torch.testing.assert_close(found[key], tensor, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        else:
            assert torch.equal(found[key].to(tensor.dtype), tensor), key
    assert torch.equal(state_here, state), "the generator's state"


@pytest.mark.parametrize("case", parameters([*CASES, *EVERYWHERE, *ATTENTION, *TIED]))
def test_the_adapter_and_the_generator_are_pefts(case):
    check(*case)


@pytest.mark.parametrize("case", parameters(HALF))
def test_they_are_in_half_precision(case):
    check(*case)


def test_a_second_adapter_goes_on_where_the_first_ended():
    options = {"peft_type": "LORA", "target_modules": ["q_proj", "down_proj"]}
    models = [model_of(library, "llama", options) for library in LIBRARIES]
    found = []
    for library, model in zip(LIBRARIES, models, strict=True):
        torch.manual_seed(6)
        model.add_adapter("second", library.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
        found.append(library.get_peft_model_state_dict(model, adapter_name="second"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][key], tensor) for key, tensor in found[0].items())


LOADED = [case for case in [*FIRST, *LORA_CASES] if case[0].get("bias") is None]  # of which there is one per model


@pytest.mark.parametrize("case", LOADED, ids=name_of)
def test_loading_draws_what_pefts_does(case, tmp_path):
    """PEFT initialises an adapter before it gets the numbers of its files."""
    options, subject = case
    model_of(peft, subject, options).save_pretrained(tmp_path)
    states = []
    for library in LIBRARIES:
        base = c.build(subject, torch.float32)
        torch.manual_seed(5)
        model = c.quiet(library.PeftModel.from_pretrained, base, tmp_path)
        states.append(torch.get_rng_state())
        c.quiet(model.load_adapter, tmp_path, "second")
        if options["peft_type"] != "UNILORA":  # whose indices are not in its files: a swap draws them again
            c.quiet(model.load_adapter, tmp_path, "second")  # numbers alone
        states.append(torch.get_rng_state())
    assert torch.equal(states[2], states[0]) and torch.equal(states[3], states[1])


def test_loading_with_low_cpu_mem_usage_draws_nothing(tmp_path):
    """As PEFT's LoRA; PEFT's VeRA and IA3, among others, draw all the same."""
    options = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    model_of(peft, "llama", options).save_pretrained(tmp_path)
    for library in LIBRARIES:
        base = c.build("llama", torch.float32)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        library.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [
    {"peft_type": "LORA", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
    {"peft_type": "VERA", "r": 4, "vera_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]},
], ids=str)  # fmt: skip
def test_training_with_dropout_gives_pefts_losses(options):
    losses = []
    for library in LIBRARIES:
        batch = c.inputs("llama")
        model = model_of(library, "llama", options).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            loss = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    torch.testing.assert_close(losses[3:], losses[:3])
