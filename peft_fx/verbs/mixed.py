"""Each row of a batch through an adapter of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..engine.derive import derived
from ..engine.transitions import names_of, refuse_merged
from ..errors import GraphError
from ..store.state import state_of


def mixed_batch(tuned: fx.GraphModule, names: Sequence[str] | None = None) -> fx.GraphModule:
    """A graph with one more input, the keyword `adapter_ids`: for each row of the batch the adapter that acts on it.

        both = peft_fx.mixed_batch(tuned, ["poems", "laws"])
        both(input_ids=ids, attention_mask=mask, adapter_ids=torch.tensor([0, 1, -1]))      # poems, laws, the base

    names: of resident adapters, in the order that the ids count; None: all of them. adapter_ids: int64, (rows,), where rows are
    the first axis of the first input; -1 is the base. Any mix runs the same code: 0 recompiles. The graph reads the adapters'
    own tensors: a hotswap into one of them, training and saving go on as elsewhere. It is made from `tuned`, which stays as it
    is; to change which adapters it holds, make another.

    Every call stacks the tensors anew; on SmolLM2 with 8 adapters of rank 16 that is a fiftieth of a call with 8 x 32 tokens.
    Raises GraphError naming the target and the reason for adapters without a form that acts row by row, where the method
    rewrites the weight, say. Calls raise GraphError for ids of another dtype, number or range. Compiled and exported graphs, and
    those on accelerators, check the range by an assertion of torch's: a RuntimeError, which torch.compile may hide behind
    another one, as its `__context__`.
    """
    state = state_of(tuned, "mixed_batch")
    refuse_merged(state, "mixed_batch")
    if isinstance(names, str):
        raise GraphError(f"names={names!r}: expected a list of adapter names")
    chosen = names_of(state, tuple(state.residents if names is None else names))
    if not chosen:
        raise GraphError("mixed_batch needs at least one adapter: apply or load one first")
    return derived(tuned, state.update(active=chosen, mixed=True))
