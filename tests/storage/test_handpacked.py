"""Every scheme on weights that are packed by hand: numbers, gradients, what traces, and the rounding back."""

import pytest
import torch
from handpacked import CASES, FLOATS
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from peft_fx.errors import StorageError
from peft_fx.storage.formats import Format
from peft_fx.storage.packed import Packed
from peft_fx.storage.schemes import SCHEMES, scheme

N, K = 96, 128
each = pytest.mark.parametrize("name", CASES)
ROUNDED = {"hqq": 2, "aqlm": 4}  # roundings in W's type on the way to an element, where there are more than one


def packed(hand):
    return Packed(Format(hand.scheme, tuple(hand.W.shape), hand.dtype, hand.facts), hand.tensors)


@pytest.fixture
def hand(name):
    return CASES[name](N, K)


def test_every_scheme_of_whole_numbers_or_codebooks_is_packed_here():
    packed_elsewhere = {"bnb4", "bnb8"}
    assert {CASES[name](N, K).scheme for name in CASES} == {
        "gptq", "awq", "hqq", "eetq", "aqlm", "inc", "inc8"} <= SCHEMES.keys() - packed_elsewhere  # fmt: skip


@each
def test_the_dense_weight_is_the_definitions(hand):
    W = packed(hand).dense()
    assert W.dtype == hand.dtype and W.shape == (N, K) and W.is_contiguous()
    if hand.scheme in ROUNDED:
        eps = ROUNDED[hand.scheme] * torch.finfo(hand.dtype).eps
        assert ((W.double() - hand.W).abs() <= eps * (hand.W.abs() + hand.W.abs().max())).all()
    else:  # an exact product, rounded once
        assert torch.equal(W, hand.W.float().to(hand.dtype))


@each
def test_the_product_and_its_gradient_are_those_of_the_dense_weight(hand):
    p = packed(hand)
    x, bias = torch.randn(2, 3, K, requires_grad=True), torch.randn(N)
    y = torch.ops.peft_fx.packed_linear(x, list(p.tensors.values()), bias, p.text)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    W, own = p.dense().float(), scheme(hand.scheme)
    assert own.rounds_inputs(p.format) == (own.linear(x, list(p.tensors.values()), bias, p.format) is not None)
    if hand.scheme == "inc8":
        s = hand.facts["input"]
        rounded = ((x.detach() / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s).bfloat16()
        assert torch.equal(y, (rounded @ p.dense().t() + bias).float())
    else:
        assert torch.equal(y, torch.nn.functional.linear(x, W, bias))
    assert torch.equal(dx, g @ W)


@each
def test_it_traces_without_numbers(name, hand):
    p = packed(hand)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in p.tensors.values()]
        W = torch.ops.peft_fx.dequantize(fakes, p.text)
        assert W.shape == (N, K) and W.dtype == hand.dtype and W.is_contiguous()
    traced = make_fx(lambda tensors: scheme(hand.scheme).dequantize(tensors, p.format), tracing_mode="fake")(
        list(p.tensors.values())
    )
    called = {n.target for n in traced.graph.nodes if n.op == "call_function"}
    assert called and not [op for op in called if op.namespace != "aten" or op._schema.is_mutable]
    assert not [n for n in traced.graph.nodes if n.op == "get_attr"], "numbers are baked in"
    again = CASES[name](N, K, seed=7)  # numbers that it was not traced with
    assert torch.equal(traced(list(again.tensors.values())), packed(again).dense())


@each
def test_rounding_in_its_grid_gives_back_what_lies_in_it(hand):
    if hand.scheme == "aqlm":
        with pytest.raises(StorageError, match="learnt"):
            scheme("aqlm").quantize(hand.W, packed(hand))
        return
    p = packed(hand)
    made = scheme(hand.scheme).quantize(p.dense(), p)
    assert [(n, t.shape, t.dtype) for n, t in made.items()] == [(n, t.shape, t.dtype) for n, t in p.tensors.items()]
    assert all(t.is_contiguous() for t in made.values())
    # the scales of a table's entries are the largest element over the largest entry, to the last bit or two
    torch.testing.assert_close(
        p.again(made).dense(), p.dense(), rtol=3e-7 if hand.facts.get("type") in FLOATS else 0, atol=0
    )


@each
def test_rounding_errs_by_half_a_step(hand):
    p = packed(hand)
    if hand.scheme in ("aqlm", "inc8") or hand.facts.get("type") in FLOATS:
        pytest.skip("no even steps")
    W = p.dense().float()
    half = STEP[hand.scheme](hand) / 2
    moved = W + (torch.rand_like(W) * 2 - 1) * half * 0.98
    made = p.again(scheme(hand.scheme).quantize(moved, p)).dense()
    assert ((made.float() - moved).abs() <= half * 1.01 + 2e-3 * W.abs() + 1e-6).all()


def steps(name, groups_last):
    def step(hand):
        s, g = hand.tensors[name].float(), hand.tensors.get("g_idx", torch.arange(K) // 32).long()
        return (s.t() if groups_last else s)[:, g]

    return step


STEP = {
    "gptq": steps("scales", True),
    "awq": steps("scales", True),
    "inc": lambda hand: steps("scales", hand.facts["optimum"])(hand),
    "hqq": lambda hand: hand.tensors["scale"].float().expand(
        -1 if hand.tensors["scale"].shape[0] > 1 else 32, -1 if hand.tensors["scale"].shape[1] > 1 else 32).reshape(N, K),
    "eetq": lambda hand: (hand.W.abs().amax(1) / 64).float()[:, None],  # the largest positive one may err by a whole step
}  # fmt: skip


def test_a_code_of_only_ones_in_the_first_version_of_gptq_is_added_to_by_the_chosen_rule():
    words = torch.full((1, 1), -1, dtype=torch.int32)  # eight zero points of 15
    tensors = [torch.zeros(1, 8, dtype=torch.int32), words, torch.ones(1, 8), torch.zeros(8, dtype=torch.int32)]

    def zeros(plus: str):
        W = scheme("gptq").dequantize(tensors, Format("gptq", (8, 8), torch.float32, {"bits": 4, "plus": plus}))
        return (-W[:, 0]).tolist()

    assert zeros("none") == [15.0] * 8
    assert zeros("wrap") == [0.0] * 8
    assert zeros("whole") == [16.0] * 8
    assert zeros("carry") == [0.0] + [1.0] * 7  # each but the first gets one more, and overflows
