"""Merging into packed weights: what is asked for, what it loses, what comes back."""

import pytest
import torch
from graphs import bits, lively, same_bits
from tiny import llama
from torch import nn

import peft_fx
from peft_fx import MergeError
from peft_fx.store.state import state_of
from peft_fx.store.tensors import get_tensor, packed_of

bnb = pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "nested", "bnb8")
Q = "model.layers.0.self_attn.q_proj.weight"
CONFIG = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def packed_linear(linear, kind):
    shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if kind == "bnb8":
        new = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(
            linear.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=kind == "nested"
        )
    new.bias = linear.bias
    return new.to("cpu")


def packed_llama(kind, **options):
    torch.manual_seed(0)
    model = lively(llama(hidden_size=64, intermediate_size=128, **options)).eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, packed_linear(child, kind))
    return model


def batch(rows=2, seed=0):
    ids = torch.randint(0, 32, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


BATCHES = [batch(8, seed) for seed in (1, 2)]


def run(graph):
    return graph(**batch()).logits


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    return peft_fx.capture(packed_llama(request.param), kwargs=batch())


@pytest.fixture(scope="module")
def nf4():
    return peft_fx.capture(packed_llama("nf4"), kwargs=batch())


def tuned_on(graph, config=CONFIG, share=0.1, seed=0):
    """An adapter whose update is this share of each weight, as a trained one's is."""
    tuned = peft_fx.apply(graph, {"init_lora_weights": False, **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for p in state_of(tuned).placed(("default",)):
            theta = [get_tensor(tuned, f"peft_fx.adapters.{p.state_name(n)}") for n in ("lora_A", "lora_B")]
            W = packed_of(tuned, p.target.name)
            if W is not None:
                scale = share * W.dense().norm() / (theta[1] @ theta[0] * 2).norm()
                theta[1].mul_(scale)
    return tuned


@pytest.fixture
def tuned(base):
    return tuned_on(base)


def exact_sum(tuned, name):
    p = next(p for p in state_of(tuned).placed(("default",)) if p.target.name == name)
    A, B = (get_tensor(tuned, f"peft_fx.adapters.{p.state_name(n)}") for n in ("lora_A", "lora_B"))
    return packed_of(tuned, name).dense() + (B.detach() @ A.detach()) * (8 / 4)


def lines(graph):
    return {line["target"]: line for line in state_of(graph).merge_report}


def test_without_storage_it_is_refused_with_a_forecast(tuned):
    before = bits(tuned)
    with pytest.raises(MergeError) as error:
        peft_fx.merge(tuned)
    worst = max(peft_fx.merge_report(tuned).rows, key=lambda row: row.requantize)
    text = str(error.value)
    assert text.startswith(f"6 packed weights would change, {Q} first: packing them again loses ")
    assert f"{worst.requantize:.2f} at {worst.target}" in text
    assert all(f"'{s}'" in text for s in ("dense", "requantize", "calibrated")) and "merge_report(tuned)" in text
    assert "\n" not in text and same_bits(before, bits(tuned))


def test_dense_is_the_sum(tuned):
    merged = peft_fx.merge(tuned, storage="dense")
    assert packed_of(merged, Q) is None
    torch.testing.assert_close(get_tensor(merged, Q).data, exact_sum(tuned, Q), rtol=0, atol=1e-6)


def test_requantize_is_what_the_package_makes_of_the_sum(tuned, base):
    merged, scheme = peft_fx.merge(tuned, storage="requantize"), packed_of(base, Q).format.scheme
    found, W = packed_of(merged, Q).tensors, exact_sum(tuned, Q)
    linear = nn.Linear(*W.shape[::-1], bias=False)
    linear.weight = nn.Parameter(W)
    kind = "bnb8" if scheme == "bnb8" else "nested" if packed_of(base, Q).format["nested"] else "nf4"
    weight = packed_linear(linear, kind).weight
    assert torch.equal(found["packed"].reshape(weight.shape), weight.data.as_subclass(torch.Tensor))
    if scheme == "bnb8":
        assert torch.equal(found["scale"], weight.SCB)
    else:
        assert torch.equal(found["absmax"], weight.quant_state.absmax)
    if kind == "nested":
        state = weight.quant_state
        assert torch.equal(found["absmax2"], state.state2.absmax) and torch.equal(found["offset"], state.offset)


@pytest.mark.parametrize("storage", ["dense", "requantize", "calibrated"])
def test_unmerge_is_bit_exact(tuned, storage):
    before, logits = bits(tuned), run(tuned)
    merged = peft_fx.merge(tuned, storage=storage, activations=BATCHES)
    assert not torch.equal(run(merged), logits)
    after = peft_fx.unmerge(merged)
    assert same_bits(before, bits(after)) and torch.equal(run(after), logits) and same_bits(before, bits(tuned))


def test_the_report_forecasts_what_merges_lose(tuned):
    report, both = peft_fx.merge_report(tuned), peft_fx.merge_report(tuned, activations=BATCHES)
    requantized = lines(peft_fx.merge(tuned, storage="requantize"))
    calibrated = lines(peft_fx.merge(tuned, storage="calibrated", activations=BATCHES))
    assert {row.target for row in report.rows} == requantized.keys() == calibrated.keys()
    for row, with_outputs in zip(report.rows, both.rows, strict=True):
        assert row.calibrated is row.requantize_outputs is None
        assert row.requantize == with_outputs.requantize == requantized[row.target]["lost"]
        assert row.change == requantized[row.target]["change"] == pytest.approx(0.1, rel=1e-3)
        assert with_outputs.calibrated_outputs == calibrated[row.target]["lost_outputs"]
        assert with_outputs.calibrated_outputs < with_outputs.requantize_outputs
        now = packed_of(peft_fx.merge(tuned, storage="requantize"), Q).dense()
    exact = exact_sum(tuned, Q)
    lost = (now - exact).norm() / (exact - packed_of(tuned, Q).dense()).norm()
    assert report.rows[0].target == Q and report.rows[0].requantize == pytest.approx(lost.item(), rel=1e-4)


def test_the_report_prints_equal_layers_as_one(nf4):
    text = str(peft_fx.merge_report(tuned_on(nf4), activations=BATCHES))
    assert "bitsandbytes 4" in text and "{0..1}" in text and "calibrated" in text and "6 packed weights" in text
    assert text.count("q_proj") == text.count("v_proj")
    assert str(peft_fx.merge_report(tuned_on(nf4, share=0.0))).startswith("no packed weight changes")


def test_inputs_are_those_of_the_merged_model(nf4):
    """XᵀX of the weight that is met last, by hooks on the calibrated graph's own operators."""
    tuned = tuned_on(nf4, {**CONFIG, "target_modules": ["down_proj"]})
    merged = peft_fx.merge(tuned, storage="calibrated", activations=BATCHES)
    name, seen = "model.layers.1.mlp.down_proj.weight", []

    class Watch(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is torch.ops.aten.linear.default and args[1].shape == (64, 128):
                seen.append(args[0].reshape(-1, 128))
            return super().call_function(target, args, kwargs)

    for one in BATCHES:
        Watch(merged).run(*one.values(), enable_io_processing=False)
    X, exact = torch.cat(seen[1::2]), exact_sum(tuned, name)
    error, change = packed_of(merged, name).dense() - exact, exact - packed_of(tuned, name).dense()
    expected = (X @ error.mT).norm() / (X @ change.mT).norm()
    assert lines(merged)[name]["lost_outputs"] == pytest.approx(expected.item(), rel=1e-3)


def test_calibrated_logits_are_nearer_to_the_adapted_ones(nf4):
    tuned = tuned_on(nf4, {**CONFIG, "target_modules": "all-linear"})
    expected, error = run(tuned), {}
    for storage in ("requantize", "calibrated"):
        merged = peft_fx.merge(tuned, storage=storage, activations=BATCHES)
        assert packed_of(merged, Q) is not None
        error[storage] = (run(merged) - expected).norm()
    assert error["calibrated"] < 0.8 * error["requantize"]


def test_batches_may_be_tuples(nf4):
    tuned = tuned_on(nf4)
    named = peft_fx.merge(tuned, storage="calibrated", activations=BATCHES)
    in_order = peft_fx.merge(tuned, storage="calibrated", activations=[tuple(b.values()) for b in BATCHES])
    assert same_bits(bits(named), bits(in_order))


def test_a_mode_is_put_back_after_calibration(nf4):
    tuned = tuned_on(nf4).train()
    assert peft_fx.merge(tuned, storage="calibrated", activations=BATCHES).training and tuned.training


def test_what_leaves_the_weight_as_it_is_packs_nothing_again():
    graph = peft_fx.capture(packed_llama("nf4", attention_bias=True), kwargs=batch())
    tuned = peft_fx.apply(graph, {"peft_type": "BEFT", "target_modules": ["q_proj"]})
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.startswith("peft_fx.adapters."):
                parameter.add_(1.0)
    before = bits(tuned)
    for storage in (None, "dense", "requantize"):
        merged = peft_fx.merge(tuned, storage=storage)
        assert packed_of(merged, Q).tensors["packed"] is packed_of(tuned, Q).tensors["packed"]
        torch.testing.assert_close(run(merged), run(tuned), rtol=1e-5, atol=1e-6)
        assert same_bits(before, bits(peft_fx.unmerge(merged)))
    with pytest.raises(MergeError, match="not kept"):
        peft_fx.unmerge(peft_fx.merge(tuned, keep_base=None))


@pytest.mark.parametrize("storage", ["dense", "requantize"])
def test_a_merged_graph_goes_through_a_file(tuned, storage, tmp_path):
    merged = peft_fx.merge(tuned, storage=storage)
    peft_fx.export(merged, tmp_path / "m.pt2")
    back = peft_fx.load(tmp_path / "m.pt2")
    assert torch.equal(run(back), run(merged)) and lines(back) == lines(merged)
    with pytest.raises(MergeError, match="not kept"):
        peft_fx.unmerge(back)


def test_an_exported_merged_graph_keeps_its_packed_bytes(nf4):
    merged = peft_fx.merge(tuned_on(nf4), storage="requantize")
    names = peft_fx.export(merged).state_dict
    assert f"{Q}_packed.packed" in names and Q not in names


REFUSED = {
    "no activations": ({"storage": "calibrated"}, "needs activations="),
    "another storage": ({"storage": "int4"}, "expected one of"),
    "no batch": ({"storage": "calibrated", "activations": []}, "no batch"),
    "another input": ({"storage": "calibrated", "activations": [{"ids": torch.ones(1, 2)}]}, "the graph takes input_ids, attention"),
    "inf": ({"storage": "requantize"}, "gives inf or nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(nf4, case):
    options, message = REFUSED[case]
    tuned = tuned_on(nf4, share=float("inf") if case == "inf" else 0.1)
    before = bits(tuned)
    with pytest.raises(peft_fx.PeftFxError, match=message):
        peft_fx.merge(tuned, **options)
    assert case == "inf" or same_bits(before, bits(tuned))


SWAPS = {
    "same targets": CONFIG,
    "some left out": {**CONFIG, "r": 2, "target_modules": ["v_proj"]},
    "others": {**CONFIG, "target_modules": ["q_proj", "o_proj"]},
}


@pytest.mark.parametrize("keep_base", ["device", "cpu"])
@pytest.mark.parametrize("storage", ["dense", "requantize"])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_swap_of_what_is_merged_is_merging_anew(nf4, swap, storage, keep_base, tmp_path):
    first = peft_fx.save_adapter(tuned_on(nf4), tmp_path / "a")
    second = peft_fx.save_adapter(tuned_on(nf4, SWAPS[swap], 0.3, 5), tmp_path / "b")
    merged = peft_fx.merge(peft_fx.load_adapter(nf4, first), storage=storage, keep_base=keep_base)
    untouched = bits(nf4)
    if (swap, storage) == ("others", "dense"):
        with pytest.raises(peft_fx.HotswapError, match="reads it packed"):
            peft_fx.hotswap(merged, second)
        return
    names = bits(merged).keys()
    peft_fx.hotswap(merged, second)
    tuned = peft_fx.load_adapter(nf4, second)
    expected = peft_fx.merge(tuned, storage=storage)
    assert torch.equal(run(merged), run(expected)) and lines(merged) == lines(expected)
    assert torch.equal(run(peft_fx.unmerge(merged)), run(tuned))
    peft_fx.hotswap(merged, first)
    again = peft_fx.load_adapter(nf4, first)
    assert torch.equal(run(merged), run(peft_fx.merge(again, storage=storage)))
    assert torch.equal(run(peft_fx.unmerge(merged)), run(again))
    assert same_bits(untouched, bits(nf4)) and names <= bits(merged).keys()


def test_a_swap_of_what_is_merged_compiles_nothing_again(base, tmp_path, fresh_dynamo):
    folder = peft_fx.save_adapter(tuned_on(base, share=0.3, seed=5), tmp_path / "b")
    merged = peft_fx.merge(tuned_on(base), storage="requantize")
    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    before = run(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        peft_fx.hotswap(compiled, folder)
        assert not torch.equal(run(compiled), before)
    torch.testing.assert_close(run(compiled), run(merged))


def test_a_swap_cannot_calibrate(nf4, tmp_path):
    folder = peft_fx.save_adapter(tuned_on(nf4, seed=5), tmp_path / "b")
    merged = peft_fx.merge(tuned_on(nf4), storage="calibrated", activations=BATCHES)
    before = bits(merged)
    with pytest.raises(peft_fx.HotswapError, match="whose activations are not kept"):
        peft_fx.hotswap(merged, folder)
    assert same_bits(before, bits(merged))
