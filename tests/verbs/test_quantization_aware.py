"""Training through the rounding of packed weights: merged is what was trained, bit for bit."""

import pytest
import torch

pytest.importorskip("bitsandbytes")

from graphs import bits, same_bits
from test_packed_merge import CONFIG, KINDS, Q, batch, exact_sum, packed_llama, run, tuned_on

import peft_fx
from peft_fx.store.tensors import get_tensor, packed_of


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    """In training: 8 bit products in evaluation round their inputs too, which dense ones do not."""
    return peft_fx.capture(packed_llama(request.param), kwargs=batch()).train()


CONFIGS = {
    "lora": CONFIG,
    "dora": {**CONFIG, "use_dora": True},
    "ia3": {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ["q_proj"]},
}


def moved(graph, config, seed=0):
    tuned, generator = peft_fx.apply(graph, config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.startswith("peft_fx.adapters."):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return tuned


@pytest.mark.parametrize("config", CONFIGS)
def test_merged_is_what_was_trained_bit_for_bit(base, config):
    tuned = moved(base, CONFIGS[config])
    aware = peft_fx.quantization_aware(tuned)
    merged = peft_fx.merge(aware, storage="requantize")
    assert packed_of(merged, Q) is not None
    names = [line["target"] for line in merged.meta["peft_fx"].merge_report]
    interpreter = Weights(aware)
    logits = interpreter.run(*batch().values(), enable_io_processing=False)[0]
    assert len(interpreter.seen) == len(names)
    assert all(torch.equal(W, packed_of(merged, name).dense()) for name, W in interpreter.seen.items())
    assert not torch.equal(run(aware), run(tuned))
    assert torch.equal(logits, run(aware))
    torch.testing.assert_close(run(merged), run(aware))  # linear or packed_linear: products of the same numbers
    assert torch.equal(run(peft_fx.unmerge(merged)), run(aware))


class Weights(torch.fx.Interpreter):
    """Target -> the weight that a forward packed again."""

    def __init__(self, gm):
        super().__init__(gm)
        self.seen = {}

    def run_node(self, n):
        value = super().run_node(n)
        if n.target is torch.ops.peft_fx.requantized.default:
            self.seen[n.meta["custom"]["peft_fx"]["target"]] = value.detach()
        return value


def test_gradients_are_those_of_the_rounded_weight(base):
    """y = x (W + (q(W) - W).detach())ᵀ, written in autograd."""
    tuned = tuned_on(base)
    aware = peft_fx.quantization_aware(tuned)
    run(aware).square().mean().backward()
    A, B = (get_tensor(tuned, f"peft_fx.adapters.default.{Q[:-7]}.on_weight.lora_{n}") for n in "AB")
    found = A.grad.clone(), B.grad.clone()
    assert A.grad.abs().sum() > 0
    A.grad = B.grad = None

    class Through(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is torch.ops.peft_fx.requantized.default:
                W, rounded = args[0], super().call_function(target, args, kwargs)
                return W + (rounded - W).detach()
            return super().call_function(target, args, kwargs)

    Through(aware).run(*batch().values(), enable_io_processing=False)[0].square().mean().backward()
    for mine, expected in zip(found, (A.grad, B.grad), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-7)
    assert exact_sum(tuned, Q).shape == packed_of(tuned, Q).shape


def test_training_brings_the_merged_model_nearer_than_rounding_afterwards():
    """A teacher's logits, learnt with and without the rounding in sight."""
    base = peft_fx.capture(packed_llama("nf4"), kwargs=batch())
    target, error = run(tuned_on(base, share=0.3, seed=9)).detach(), {}
    for aware in (False, True):
        tuned = tuned_on(base, share=0.01)
        graph = peft_fx.quantization_aware(tuned) if aware else tuned
        optimizer = torch.optim.Adam([p for p in graph.parameters() if p.requires_grad], 1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            (run(graph) - target).square().mean().backward()
            optimizer.step()
        error[aware] = (run(peft_fx.merge(graph, storage="requantize")) - target).norm()
    assert error[True] < 0.8 * error[False]


def test_an_adapter_that_does_nothing_yet_changes_nothing(base):
    tuned = peft_fx.apply(base, CONFIG)
    torch.testing.assert_close(run(peft_fx.quantization_aware(tuned)), run(base))


def test_it_shares_its_tensors_and_can_be_left(base):
    tuned = tuned_on(base)
    aware = peft_fx.quantization_aware(tuned)
    assert same_bits(bits(tuned), bits(aware))
    assert torch.equal(run(peft_fx.quantization_aware(aware, on=False)), run(tuned))
    assert torch.equal(run(peft_fx.set_adapter(aware, "default")), run(aware))


def test_it_compiles_whole_and_goes_through_a_file(base, tmp_path, fresh_dynamo):
    aware = peft_fx.quantization_aware(tuned_on(base))
    torch.testing.assert_close(run(torch.compile(aware, fullgraph=True, backend="aot_eager")), run(aware))
    peft_fx.export(aware, tmp_path / "a.pt2")
    back = peft_fx.load(tmp_path / "a.pt2")
    assert torch.equal(run(back), run(aware))
    merged = peft_fx.merge(back, storage="requantize")
    assert torch.equal(run(merged), run(peft_fx.merge(aware, storage="requantize")))
    assert torch.equal(run(peft_fx.unmerge(merged)), run(aware))


def test_refusals(base):
    two = peft_fx.apply(tuned_on(base), CONFIG, "second")
    two = peft_fx.set_adapter(two, ["default", "second"])
    with pytest.raises(peft_fx.RecipeError, match="2 adapters act on this packed weight"):
        peft_fx.quantization_aware(two)
    with pytest.raises(peft_fx.RecipeError, match="dropout 0.1 on the input"):
        peft_fx.quantization_aware(peft_fx.apply(base, {**CONFIG, "lora_dropout": 0.1}))
    with pytest.raises(peft_fx.GraphError, match="merged graph"):
        peft_fx.quantization_aware(peft_fx.merge(tuned_on(base), storage="dense"))
