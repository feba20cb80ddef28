"""peft_fx::seeded_noise: normal noise from a generator of one's own, whose state is a tensor.

    seeded_noise(like, state, always, training) -> noise of like's shape and dtype; state moves on
    zeros, and the state stays, unless always or training: a literal True for `training` follows the graph's mode

state: (5056,) uint8, `torch.Generator().get_state()`. The generator is the CPU's wherever `like` is, as in PEFT. No gradient.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("peft_fx::seeded_noise", mutates_args=("state",))
def seeded_noise(like: torch.Tensor, state: torch.Tensor, always: bool, training: bool) -> torch.Tensor:
    if not always and not training:
        return torch.zeros_like(like)
    generator = torch.Generator()
    generator.set_state(state.cpu())
    noise = torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)
    state.copy_(generator.get_state())
    return noise


@seeded_noise.register_fake
def _(like, state, always, training):
    return torch.empty_like(like, memory_format=torch.contiguous_format)
