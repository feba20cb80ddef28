"""A packed linear layer beside the same by hand and beside its package's module, and the capture of a packed model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from contenders import MODELS, pack, seconds

import peft_fx
from peft_fx.storage.recognise import recognise

IN, OUT, TOKENS = 576, 1536, 512  # SmolLM2's, four sequences of 128
ROUNDS = 40


def packed_rows(quick: bool) -> Iterator[tuple[str, list[float], list[float], float | None]]:
    """(name, our seconds, theirs, goal) per row."""
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False)).train()
    pack(model)
    packed = recognise(model[0])
    tensors, x = list(packed.tensors.values()), torch.randn(TOKENS, IN, requires_grad=True)

    def both_ways(layer: Callable) -> Callable:
        def step() -> None:
            x.grad = None
            layer(x).sum().backward()

        return step

    ops = torch.ops.peft_fx
    ours = both_ways(lambda x: ops.packed_linear(x, tensors, None, packed.text))
    by_hand = both_ways(lambda x: torch.nn.functional.linear(x, ops.dequantize(tensors, packed.text)))
    size, rounds = f"{OUT} x {IN}, {TOKENS} tokens", 5 if quick else ROUNDS
    yield f"nf4 linear, forward and backward, {size}: against dequantize + linear", *turns(ours, by_hand, rounds), 1.1
    yield (
        f"nf4 linear, forward and backward, {size}: against bitsandbytes'",
        *turns(ours, both_ways(model), rounds),
        1.0,
    )
    name = "2 x 1024 Llama" if quick else "SmolLM2-135M"
    dense, nf4 = MODELS[name](), MODELS[name]()
    pack(nf4)
    rounds = 1 if quick else 3
    yield (
        f"{name}: capture, nf4 against dense",
        *turns(*(lambda m=m: peft_fx.capture(m) for m in (nf4, dense)), rounds),
        1.3,
    )


def turns(ours: Callable, theirs: Callable, count: int) -> tuple[list[float], list[float]]:
    """Seconds of both, taking turns, a round to warm up left out."""
    found: tuple[list[float], list[float]] = ([], [])
    for i in range(count + 1):
        for kept, work in zip(found, (ours, theirs), strict=True):
            took = seconds(work)
            if i:
                kept.append(took)
    return found
