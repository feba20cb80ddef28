"""The metadata of nodes that a pass adds."""

import pytest
import torch
from handmade import Hand, aten
from peft_fx.passes.core.fakes import fake_mode_of, fake_of
from torch import fx, nn

from peft_fx.errors import GraphError

TENSORS = {
    "a parameter": nn.Parameter(torch.randn(3, 4)),
    "frozen": nn.Parameter(torch.randn(3, 4), requires_grad=False),
    "transposed": torch.randn(3, 4).t(),
    "half": torch.randn(3, 4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_fake_says_of_a_tensor_what_it_is(case):
    hand, tensor = Hand(), TENSORS[case]
    fake, again = fake_of(hand.mode, tensor), fake_of(hand.mode, tensor)
    facts = [(t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in (fake, tensor)]
    assert facts[0] == facts[1] and fake.fake_mode is hand.mode and fake is not again
    assert all(isinstance(size, int) for size in fake.shape)
    assert fake.stride() == tensor.stride()


def test_the_mode_is_that_of_the_capture():
    hand = Hand()
    gm = hand.output(hand.call(aten.sin.default, hand.input("x", torch.randn(3))))
    assert fake_mode_of(gm) is hand.mode
    with pytest.raises(GraphError, match="no tensor metadata: capture it"):
        fake_mode_of(fx.symbolic_trace(lambda x: torch.sin(x)))
