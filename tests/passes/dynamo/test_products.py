"""Large float32 products of compiled graphs through oneDNN: same numbers, forward and backward, and nothing else touched."""

import pytest
import torch
from peft_fx.passes.dynamo.products import Products, options_with
from torch._inductor.utils import fresh_cache

import peft_fx as fx
from peft_fx.kernels import product

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"),
]
ROWS, WIDE = 40, 256
LORA = {"peft_type": "LORA", "r": 4, "init_lora_weights": False, "target_modules": ["0", "2"]}


@pytest.fixture
def helps(monkeypatch):
    """As on a machine where it helps; the cache keeps no graph of another test."""
    monkeypatch.setattr(product, "faster_here", lambda: True)
    with fresh_cache():
        torch.compiler.reset()
        yield
        torch.compiler.reset()


@pytest.fixture
def replaced(monkeypatch):
    """Per graph that Inductor got: which products there were before and after the pass."""
    seen, plain = [], Products.__call__
    count = lambda graph: sum("product" in str(n.target) for n in graph.nodes)  # noqa: E731
    others = lambda graph: sum("mm." in str(n.target) for n in graph.nodes)  # noqa: E731

    def watched(self, graph):
        before = others(graph)
        plain(self, graph)
        seen.append((before, others(graph), count(graph)))

    monkeypatch.setattr(Products, "__call__", watched)
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_the_operator_is_a_product(turned, bias):
    a, b = torch.randn(5, 7), torch.randn(3, 7).t() if turned else torch.randn(7, 3)
    c = torch.randn(3) if bias else None
    found = torch.ops.peft_fx.product(a, b, c)
    expected = a.double() @ b.double() + (0 if c is None else c.double())
    assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)
    torch.library.opcheck(torch.ops.peft_fx.product.default, (a, b, c), test_utils=("test_schema", "test_faketensor"))


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Linear(WIDE, WIDE), torch.nn.GELU(), torch.nn.Linear(WIDE, WIDE, bias=False)
    return torch.nn.Sequential(*layers).to(dtype).eval()


def step(graph, x):
    """Output and all gradients of one step."""
    x = x.clone().requires_grad_()
    y = graph(x)
    y.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in graph.parameters() if p.requires_grad)]
    for p in graph.parameters():
        p.grad = None
    return [y.detach(), *gradients]


def test_forward_and_backward_of_a_compiled_adapted_graph(helps, replaced):
    x = torch.randn(ROWS, WIDE)
    tuned = fx.apply(fx.capture(model(), (x,)), LORA)
    expected, found = step(tuned, x), step(fx.compile(tuned), x)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < 1e-5, errors
    products = [made for _, _, made in replaced]
    assert sum(products) == 4, replaced  # two forward, two towards x: the base's; LoRA's are thin
    assert all(before == after + made for before, after, made in replaced)


def test_thin_and_other_dtypes_stay(helps, replaced):
    for dtype, rows in ((torch.float64, ROWS), (torch.bfloat16, ROWS), (torch.float32, 4)):
        x = torch.randn(rows, WIDE, dtype=dtype)
        graph = fx.capture(model(dtype), (x,))
        with torch.no_grad():
            assert torch.allclose(fx.compile(graph)(x), graph(x), atol=1e-2)
    assert sum(before for before, *_ in replaced) == 6 and not any(made for *_, made in replaced)


def test_a_swap_needs_no_new_code(helps, tmp_path):
    x = torch.randn(ROWS, WIDE)
    graph = fx.capture(model(), (x,))
    torch.manual_seed(1)
    other = fx.apply(graph, LORA)
    fx.save_adapter(other, tmp_path)
    tuned = fx.apply(graph, LORA)
    compiled = fx.compile(tuned)
    with torch.no_grad():
        compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            fx.hotswap(compiled, tmp_path)
            assert torch.allclose(compiled(x), other(x), atol=1e-4)


def test_options_keep_what_the_user_chose(monkeypatch):
    monkeypatch.setattr(product, "faster_here", lambda: True)
    options = options_with("max-autotune-no-cudagraphs", {"epilogue_fusion": False})
    assert options["max_autotune"] and options["epilogue_fusion"] is False
    assert isinstance(options.pop("post_grad_custom_pre_pass"), Products)
    mine = Products()
    assert options_with(None, {"post_grad_custom_pre_pass": mine})["post_grad_custom_pre_pass"] is mine
    monkeypatch.setattr(product, "faster_here", lambda: False)
    assert options_with(None, None) == {}


def test_the_machine_is_judged_by_its_maker(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for maker, faster in (("vendor_id\t: AuthenticAMD", True), ("vendor_id\t: GenuineIntel", False), ("", False)):
        product.faster_here.cache_clear()
        monkeypatch.setattr(product, "maker", lambda maker=maker: maker)
        assert product.faster_here() == (faster and torch.backends.mkl.is_available())
    product.faster_here.cache_clear()
