"""The custom operators: their definition, gradients, stacks, and what torch.compile, torch.export and tracing see of them."""

import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import peft_fx as fx
from peft_fx.kernels import butterfly, circulant, householder

# operator, its definition, shape of x, shape of the parameter, further arguments
CASES = [
    (butterfly.butterfly, butterfly.reference, (3, 2, 24), (6, 4, 4), (1,)),
    (butterfly.butterfly, butterfly.reference, (5, 32), (8, 4, 4), (2,)),
    (butterfly.butterfly, butterfly.reference, (32,), (8, 4, 4), (4,)),
    (butterfly.butterfly, butterfly.reference, (3, 6), (1, 6, 6), (1,)),
    (householder.householder, householder.reference, (3, 2, 7), (7, 3), (False,)),
    (householder.householder, householder.reference, (4, 7), (7, 3), (True,)),
    (householder.householder, householder.reference, (7,), (7, 1), (False,)),
    (circulant.circulant, circulant.reference, (3, 2, 8), (3, 2, 4), ()),
    (circulant.circulant, circulant.reference, (5, 9), (2, 3, 3), ()),
    (circulant.circulant, circulant.reference, (4,), (2, 4, 1), ()),
]
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]._name}{c[2]}{c[3]}{c[4]}")
ONE_EACH = pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8]], ids=lambda c: c[0]._name)


def operands(case, dtype=torch.float64, stacks=((), ())):
    torch.manual_seed(0)
    return [torch.randn(*e, *s, dtype=dtype).requires_grad_() for e, s in zip(stacks, case[2:4], strict=True)]


def calls(graph, op) -> int:
    return sum(str(n.target).startswith(op._qualname.replace("::", ".")) for n in graph.nodes)


@EVERY
def test_the_operator_is_its_definition(case):
    op, definition, *_, rest = case
    x, p = operands(case)
    assert torch.allclose(op(x, p, *rest), definition(x, p, *rest), atol=1e-12)


@pytest.mark.slow
@EVERY
def test_first_and_second_derivatives_are_those_of_finite_differences(case):
    op, rest, (x, p) = case[0], case[4], operands(case)
    assert torch.autograd.gradcheck(lambda x, p: op(x, p, *rest), (x, p))
    assert torch.autograd.gradgradcheck(lambda x, p: op(x, p, *rest), (x, p))


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_s_checks_of_operators_pass(case, dtype):
    op, rest, (x, p) = case[0], case[4], operands(case, dtype)
    torch.library.opcheck(op, (x, p, *rest))
    strided = torch.stack([x, x], -1)[..., 0].detach()
    torch.library.opcheck(op, (strided, p.detach(), *rest))


@ONE_EACH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_narrow_dtypes_lose_what_rounding_loses(case, dtype, tolerance):
    op, rest, (x, p) = case[0], case[4], operands(case, dtype)
    exact = op(x.double(), p.double(), *rest)
    found = op(x, p, *rest)
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= tolerance * exact.abs().max()
    found.sum().backward()
    assert (x.grad.dtype, p.grad.dtype) == (dtype, dtype)


@ONE_EACH
def test_autocast_changes_nothing(case):
    op, rest, (x, p) = case[0], case[4], operands(case, torch.float32)
    expected = torch.autograd.grad(op(x, p, *rest).sum(), (x, p))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(op(x, p, *rest).sum(), (x, p))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@EVERY
@pytest.mark.parametrize("batched", [(0, 0), (None, 0), (0, None), (1, 1)], ids=str)
def test_vmap_is_the_operator_one_by_one(case, batched):
    op, rest = case[0], case[4]
    stacks = [() if axis is None else (2,) for axis in batched]
    x, p = operands(case, stacks=stacks)
    axes = [axis and min(axis, t.dim() - 1) for axis, t in zip(batched, (x, p), strict=True)]
    moved = [t if axis is None else t.movedim(0, axis) for t, axis in zip((x, p), axes, strict=True)]
    found = torch.vmap(lambda x, p: op(x, p, *rest), tuple(axes))(*moved)
    one = lambda t, axis, i: t if axis is None else t[i]  # noqa: E731
    expected = torch.stack([op(one(x, axes[0], i), one(p, axes[1], i), *rest) for i in range(2)])
    assert torch.allclose(found, expected, atol=1e-12)
    gradients = [torch.autograd.grad(y.sin().sum(), (x, p)) for y in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


@ONE_EACH
def test_tracing_compiling_and_exporting_see_one_node(case):
    op, rest, (x, p) = case[0], case[4], operands(case, torch.float32)

    class Call(torch.nn.Module):
        def forward(self, x, p):
            return op(x, p, *rest)

    graphs = []

    def backend(gm, inputs):
        graphs.append(gm.graph)
        return gm

    expected = op(x, p, *rest)
    assert calls(make_fx(Call(), pre_dispatch=True, tracing_mode="fake")(x, p).graph, op) == 1
    assert torch.equal(torch.compile(Call(), fullgraph=True, backend=backend)(x, p), expected)
    assert [calls(graph, op) for graph in graphs] == [1]
    program = torch.export.export(Call(), (x.detach(), p.detach())).run_decompositions()
    assert calls(program.graph, op) == 1
    compiled = torch.compile(Call(), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, p).sin().sum(), (x, p))
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(found, torch.autograd.grad(expected.sin().sum(), (x, p)), strict=True)
    )


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 12)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"peft_type": "BOFT", "boft_block_size": 2, "boft_n_butterfly_factor": 2}, "butterfly"),
        ({"peft_type": "OFT", "oft_block_size": 4}, "butterfly"),
        ({"peft_type": "HRA", "r": 2}, "householder"),
        ({"peft_type": "C3A", "block_size": 4}, "circulant"),
    ],
    ids=lambda o: o["peft_type"] if isinstance(o, dict) else "",
)
def test_a_saved_graph_holds_the_operator_and_runs_in_a_new_process(options, name, tmp_path):
    x = torch.randn(3, 8)
    tuned = fx.apply(
        fx.capture(Model(), kwargs={"x": x}), {"target_modules": ["layer"], **options}, lowering="activation"
    )
    named = [str(n.target) for n in tuned.graph.nodes]
    assert sum(n == f"peft_fx.{name}.default" for n in named) == options.get("boft_n_butterfly_factor", 1)
    program = fx.export(tuned, tmp_path / "graph.pt2")
    assert any(str(n.target) == f"peft_fx.{name}.default" for n in program.graph.nodes)
    assert torch.allclose(fx.load(tmp_path / "graph.pt2")(x=x), tuned(x=x), atol=1e-6)
    torch.save((x, tuned(x=x).detach()), tmp_path / "expected.pt")
    code = (
        f"import torch, peft_fx; x, y = torch.load({str(tmp_path / 'expected.pt')!r}); "
        f"assert torch.allclose(peft_fx.load({str(tmp_path / 'graph.pt2')!r})(x=x), y, atol=1e-6)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
