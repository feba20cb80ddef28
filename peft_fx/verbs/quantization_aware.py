"""Training that sees what a merge into packed weights is going to make of them."""

from __future__ import annotations

from torch import fx

from ..engine.derive import derived
from ..engine.transitions import refuse_merged
from ..store.state import state_of


def quantization_aware(tuned: fx.GraphModule, on: bool = True) -> fx.GraphModule:
    """A graph in which packed weights with adapters are `quantize(W_merged)`, as `merge(storage="requantize")` will keep them;
    gradients go straight through the rounding (arXiv:1308.3432).

        aware = peft_fx.quantization_aware(tuned)       # the same parameters: train it, then
        merged = peft_fx.merge(aware, storage="requantize")     # has the weights of `aware`, bit for bit

    What is equal are the weights: packages may take products of packed ones otherwise, LLM.int8() rounds inputs in evaluation.

    tuned: with adapters; its tensors are shared, it stays as it is. on: False gives the graph without the rounding. Forwards
    pack each such weight again and keep it dense until the backward. Weights that are not packed are adapted as before.

    Raises RecipeError naming the target where two adapters act on one packed weight, and where the method has dropout on its
    input or needs the activation form; GraphError for a merged graph.
    """
    state = state_of(tuned, "quantization_aware")
    refuse_merged(state, "quantization_aware")
    return derived(tuned, state.update(aware=on))
