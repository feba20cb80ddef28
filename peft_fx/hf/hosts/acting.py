"""What a call sees of a model's adapters: a snapshot, taken once at its outermost module and read by all below it.

set, disable, merge, ...   publish another snapshot; calls that run go on with theirs
the same adapters again    the same snapshot: what was traced, or compiled by a torch.compile around, is used again
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import torch

from ...planning.plan import Placement
from ...store.state import State
from .traced import Ready

KEPT = 32  # snapshots that are not published now


class Acting:
    """The adapters that act, and what they put into each host. gated: behind gates, which are data. tables: host's index ->
    kind of call -> what runs.

    Nothing changes in it, but that a first call of its kind adds what runs.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        placed: Mapping[int, tuple[Placement, ...]],
        hosts: Iterable[int],
        gated: bool = False,
    ):
        self.names, self.placed, self.gated = names, placed, gated
        self.tables: dict[int, dict[tuple, Ready]] = {index: {} for index in hosts}

    def table(self, index: int) -> dict[tuple, Ready]:
        """Of a host; one that came after the snapshot has nothing in it."""
        return self.tables.get(index) or self.tables.setdefault(index, {})


class Snapshots:
    """Those of one model that are used again, the last ones first to stay."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, Acting] = OrderedDict()

    def find(self, state: State, names: tuple[str, ...], hosts: Mapping[str, int], gated: bool = False) -> Acting:
        """Of these adapters, wherever their numbers came from. hosts: path of a target's module -> index of its host."""
        key = (gated, *(state.recipe[name].home for name in names))
        if key not in self.kept:
            placed: dict[int, tuple[Placement, ...]] = {}
            for p in state.placed(names):
                if (index := hosts.get(p.target.path)) is not None:  # else the model has lost that module
                    placed[index] = (*placed.get(index, ()), p)
            self.kept[key] = Acting(names, placed, set(hosts.values()), gated)
        self.kept.move_to_end(key)
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return self.kept[key]

    def forget(self, state: State, also: Iterable[str] = ()) -> None:
        """Drops those of adapters that are no more, or whose graphs are others now."""
        homes = {resident.home for name, resident in state.recipe.items() if name not in also}
        self.kept = OrderedDict((key, acting) for key, acting in self.kept.items() if homes.issuperset(key[1:]))


class Rows:
    """Which adapter each row of a batch has. acting: adapter -> its snapshot."""

    def __init__(self, names: Sequence[str], acting: Mapping[str, Acting]):
        self.names, self.acting = tuple(names), acting
        self.found: dict[tuple, dict[str, torch.Tensor]] = {}

    def by_adapter(self, length: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Adapter -> indices of its rows, in a batch of `length` rows."""
        if (length, device) not in self.found:
            each = [name for name in self.names for _ in range(length // len(self.names))]
            self.found[length, device] = {
                name: torch.tensor([i for i, n in enumerate(each) if n == name], device=device)
                for name in dict.fromkeys(each)
            }
        return self.found[length, device]
