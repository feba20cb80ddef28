"""`merge_report`: what `merge` is going to lose on packed weights, by each of its `storage`s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..engine.calibrating import visit
from ..engine.forecasting import Forecast, forecast
from ..folding import components, gathered, joined
from ..store.modules import reading
from ..store.state import state_of
from ..tables import Shown, Table, counted
from .merge import begin


@dataclass(frozen=True, repr=False)
class MergeReport(Shown):
    """Every packed weight that a merge changes, one of `rows` each; printed, those of equal layers are one line, with the
    largest losses, and the bytes of all of them.

    What is lost is a share of what the adapters do: 1 is as much. on_outputs: of products with given activations.
    """

    rows: tuple[Forecast, ...]
    on_outputs: bool = False

    def parts(self) -> list[str | Table]:
        if not self.rows:
            return ["no packed weight changes: storage= makes no difference to this merge"]
        paths = (((r.scheme, r.shape, r.reason), components(r.target), r) for r in self.rows)
        groups = [(joined(path).removesuffix(".weight"), rows) for path, rows in gathered(paths)]
        lost = (
            "lost of the change of products with the activations" if self.on_outputs else "lost of the weight's change"
        )
        notes = [f"{name}: {rows[0].reason}" for name, rows in groups if rows[0].reason]
        return [
            self.table(groups),
            *notes,
            f"{counted(len(self.rows), 'packed weight')} · requantize, calibrated: {lost}",
        ]

    def table(self, groups: Sequence[tuple[str, list[Forecast]]]) -> Table:
        """What nobody knows is left out."""
        of = "_outputs" if self.on_outputs else ""
        columns: dict[str, Callable[[list[Forecast]], str]] = {
            "×": lambda rows: str(len(rows)) if len(rows) > 1 else "",
            "scheme": lambda rows: rows[0].scheme,
            "change": lambda rows: f"{max(r.change for r in rows):.1%}",
            "requantize": lambda rows: largest(getattr(r, f"requantize{of}") for r in rows),
            "calibrated": lambda rows: largest(getattr(r, f"calibrated{of}") for r in rows),
            "MB": lambda rows: megabytes(r.packed for r in rows),
            "dense MB": lambda rows: megabytes(r.dense for r in rows),
        }
        cells = {head: [value(rows) for _, rows in groups] for head, value in columns.items()}
        shown = {head: column for head, column in cells.items() if any(column)}
        lines = list(zip([name for name, _ in groups], *shown.values(), strict=True))
        return Table(("target", *shown), lines, frozenset(shown) - {"scheme"})


def largest(lost: Iterable[float | None]) -> str:
    known = [x for x in lost if x is not None]
    return f"{max(known):.2f}" if known else ""


def megabytes(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 1e6:,.2f}"


def merge_report(
    tuned: fx.GraphModule,
    adapter_names: str | list[str] | None = None,
    *,
    activations: Iterable[Any] | None = None,
) -> MergeReport:
    """What merging these adapters, None: the active ones, would lose on packed weights; nothing is merged.

    activations: batches of the graph's inputs, each a dict or a tuple: with them what `storage="calibrated"` loses is known as
    well, and what either loses on the products. Costs a merge, with activations one that calibrates.

    Printed, weights of equal layers are one line; `.rows` has each. Raises MergeError as `merge` does.
    """
    state_of(tuned, "merge_report")
    rows: dict[str, Forecast] = {}
    with reading(tuned):
        begun = begin(tuned, adapter_names, check_finite=True, keep_base=None, untie=True, storage=None)

        def keep(name: str, H: torch.Tensor | None) -> torch.Tensor:
            rows[name], now = forecast(tuned, begun.waiting[name], H)
            return now

        targets = {name: group[0].target for name, group in begun.waiting.items()}
        visit(begun.graph, targets, activations, keep)
    return MergeReport(tuple(rows[name] for name in begun.waiting), activations is not None)
