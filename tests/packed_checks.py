"""What holds for every packed weight, whatever its scheme."""

import torch
from peft_fx.kernels.packed import of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

ops = torch.ops.peft_fx


def check_packed(packed):
    """Shape and dtype, with fakes and traced too; of a matrix also the product, its gradient and chosen rows. The dense weight."""
    dense, tensors, text = packed.dense(), list(packed.tensors.values()), packed.text
    storage, f = of(text)
    assert dense.shape == f.shape and dense.dtype == f.dtype
    assert all(type(t) is torch.Tensor and not t.is_inference() for t in tensors)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        for W in (ops.dequantize(fakes, text), storage.dequantize(fakes, f)):
            assert W.shape == f.shape and W.dtype == f.dtype
    graph = make_fx(lambda *t: storage.dequantize(t, f), tracing_mode="fake")(*tensors)
    assert torch.equal(graph(*tensors), dense)
    called = [n.target for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert called and not any(op._schema.is_mutable for op in called)
    if dense.ndim == 2:
        check_matrix(tensors, text, dense)
    return dense


def check_matrix(tensors, text, dense):
    torch.manual_seed(0)
    x = torch.randn(3, 5, dense.shape[1], dtype=dense.dtype, requires_grad=True)
    bias, g = torch.randn(dense.shape[0], dtype=dense.dtype), torch.randn(3, 5, dense.shape[0], dtype=dense.dtype)
    if "inputs" not in of(text)[1].facts:
        assert torch.equal(ops.packed_linear(x, tensors, bias, text), F.linear(x, dense, bias))
    ops.packed_linear(x, tensors, bias, text).backward(g)
    assert torch.equal(x.grad, g @ dense)
    ids = torch.tensor([[0, dense.shape[0] - 1], [1, 0]])
    assert torch.equal(ops.packed_embedding(ids, tensors, text), dense[ids])


def check_place(module, parameter, packed, new):
    """The layer has the new numbers, and after the undo the objects that it had. new: tensors by name."""
    from peft_fx.storage.recognise import recognise

    storage = of(packed.text)[0]
    slots = (module._parameters, module._buffers, module.__dict__)
    before = [dict(s) for s in slots]
    other = packed.again(new)
    undo = storage.place(module, parameter, other)
    assert torch.equal(recognise(module, parameter).dense(), other.dense())
    undo()
    for slot, old in zip(slots, before, strict=True):
        assert slot.keys() == old.keys() and all(slot[k] is old[k] for k in old)
    assert torch.equal(recognise(module, parameter).dense(), packed.dense())
