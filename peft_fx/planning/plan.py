"""What one adapter puts where: the decision, as plain data, before anything is changed.

A plan holds one placement per (adapter, target), substitutions first: where an adapter brings its own bias, its method
sees that bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from ..config import AdapterConfig
from ..errors import AdapterNameError, TargetError, WrongTypeError
from ..methods import METHODS, get_method
from ..methods.base import Method, Tensor, Together
from ..methods.stacked import on_target, restacked, unstacked
from ..target import ModuleRecord, ModuleTable, Target, sizes
from .kinds import Refusal, one_line_each, whole_parameter
from .matching import Unmatched, inside
from .saved import SavedModule
from .selection import Selection, completed, select
from .tokens import TokenRows
from .wrappers import base_path, inside_path, wrap_counts

__all__ = ["Placement", "Plan", "Refusal", "Shared", "Unmatched", "check_adapter_name", "clashes", "make_plan"]

PREFIX = "base_model.model."  # PEFT's wrappers around the model, part of every key in its files
PREFIX_SHARED = "base_model."  # of tensors that the whole adapter shares
ROOT_KEY = "/"  # marks their keys
MAX_NAME_BYTES, SHOWN = 200, 40  # of an adapter's name; of these in a message


@dataclass(frozen=True)
class Shared:
    """A tensor of another placement that this one uses: its state name, and whether its transpose is meant."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Placement:
    """One method on one target.

    shared: names among `tensors` that are another placement's tensor, not its own. lowering: the form asked for, or "auto".
    """

    adapter: str
    method: str
    target: Target
    config: AdapterConfig
    tensors: dict[str, Tensor]
    shared: dict[str, Shared] = field(default_factory=dict)
    lowering: str = "auto"

    @property
    def rule(self) -> Method:
        """The method, as it acts on this target."""
        return on_target(get_method(self.method), self.target, self.tensors)

    def state_name(self, tensor: str) -> str:
        """Dotted name of a tensor below the graph module's `peft_fx.adapters`: <adapter>.<module>.on_<parameter>.<tensor>.

        No module there is called "weight" or "bias": loops over all modules of a model take these for tensors.
        """
        path, _, parameter = self.target.name.rpartition(".")
        return ".".join(filter(None, (self.adapter, path, f"on_{parameter}", tensor)))

    def file_key(self, tensor: str) -> str:
        """The tensor's key in PEFT's `adapter_model.safetensors`."""
        key = self.tensors[tensor].key or ""
        if key.startswith(ROOT_KEY):
            return PREFIX_SHARED + key[len(ROOT_KEY) :]
        return f"{PREFIX}{self.target.file_path}.{key}"

    def file_keys(self, tensor: str) -> tuple[str, ...]:
        """The keys under which files hold the tensor: its own, or one per piece."""
        key, pieces = self.file_key(tensor), self.tensors[tensor].pieces
        if pieces is None:
            return (key,)
        return tuple(key + end for end in pieces.ends or map(".{}".format, range(pieces.count)))

    def saved(self) -> Iterator[tuple[str, str, Tensor]]:
        """(tensor name, file key, description) of what is written to a file."""
        return ((name, self.file_key(name), t) for name, t in self.tensors.items() if t.key is not None)

    def resolve(self, tensor: str) -> Shared:
        """Where the numbers live: the tensor's own state name, or the one it shares."""
        return self.shared.get(tensor, Shared(self.state_name(tensor)))


@dataclass(frozen=True)
class Plan:
    """All placements of one adapter, what was refused, and the config entries that matched nothing."""

    placements: tuple[Placement, ...]
    refusals: tuple[Refusal, ...] = ()
    unmatched: tuple[Unmatched, ...] = ()

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(p.target for p in self.placements)

    @cached_property
    def filed(self) -> tuple[tuple[Placement, str, tuple[str, ...]], ...]:
        """(placement, tensor name, keys) of everything that is in the adapter's file."""
        return tuple((p, name, p.file_keys(name)) for p in self.placements for name, _, _ in p.saved())


def make_plan(table: ModuleTable, adapter: str, config: AdapterConfig, strict: bool = True) -> Plan:
    """Plans `config` under the name `adapter`.

    Raises RecipeError if the config chooses nothing, or if a target is refused: all refusals in one message. With
    strict=False refused targets are left out and listed.
    """
    check_adapter_name(adapter)
    config = completed(table, config)
    selection = select(table, config)
    adapted, refusals = adapted_placements(table, selection, adapter, config)
    substitutions = [
        *saved_placements(table, selection, adapter, config),
        *bias_placements(table, selection, adapter, config),
        *token_placements(selection, adapter, config),
    ]
    refusals = [*selection.refusals, *refusals]
    if refusals and strict:
        raise TargetError(
            "\n  ".join([f"adapter {adapter!r}: {len(refusals)} target(s) refused", *one_line_each(refusals)])
        )
    return Plan((*substitutions, *adapted), tuple(refusals), selection.unmatched)


def clashes(placements: Iterable[Placement]) -> list[Refusal]:
    """Targets for which two adapters bring numbers of their own: one would undo the other."""
    owners: dict[str, list[tuple[str, Sequence[int]]]] = {}
    found = []
    for p in placements:
        rows = p.rule.own_rows(p.target, p.config)
        for adapter, taken in owners.get(p.target.name, ()):
            if adapter != p.adapter and not set(taken).isdisjoint(rows):
                reason = (
                    f"refused: adapters {adapter!r} and {p.adapter!r} each replace its numbers; only one can be active"
                )
                found.append(Refusal(p.target.name, reason))
        owners.setdefault(p.target.name, []).append((p.adapter, rows))
    return found


def check_adapter_name(adapter: str) -> None:
    """Raises RecipeError unless `adapter` can name a submodule, and a folder of its own in the one it is saved to."""
    if not isinstance(adapter, str):
        raise WrongTypeError(f"adapter name {adapter!r}: expected a string, got {type(adapter).__name__}")
    if not adapter or "." in adapter:
        raise AdapterNameError(f"adapter name {adapter!r}: expected a non-empty string without a dot")
    if not adapter.isprintable() or "/" in adapter or "\\" in adapter or len(adapter.encode()) > MAX_NAME_BYTES:
        raise AdapterNameError(
            f"adapter name {adapter[:SHOWN]!r}{'...' * (len(adapter) > SHOWN)}: it names a folder too: expected printable "
            f"characters, no slash or backslash, and at most {MAX_NAME_BYTES} bytes"
        )
    if adapter in METHODS or hasattr(nn.Module(), adapter):
        raise AdapterNameError(f"adapter name {adapter!r} is reserved: a method, or an attribute of torch.nn.Module")


def refused(method: Method, target: Target) -> str | None:
    """Why the method has no meaning on this kind of operator, or None."""
    reason = method.refuses.get(target.kind)
    return reason and reason.format(name=method.name, shape=sizes(target.shape))


def method_at(general: Method, target: Target, config: AdapterConfig) -> Method:
    """What a config's method is on this target: the variant for its kind, and for its experts."""
    chosen = general.at(target, config)
    variant = chosen.variants.get(target.kind)
    return on_target(get_method(variant) if variant else chosen, target)


def adapted_placements(
    table: ModuleTable, selection: Selection, adapter: str, config: AdapterConfig
) -> tuple[list[Placement], list[Refusal]]:
    """The method itself on every target that it can adapt."""
    general, placements, refusals = get_method(config.peft_type), [], []
    for target in (t for chosen in selection.targets for t in general.places(chosen, table[chosen.path], config)):
        method = method_at(general, target, config)
        if reason := refused(method, target) or method.check(target, config):
            refusals.append(Refusal(target.name, reason))
        else:
            placements.append(Placement(adapter, method.name, target, config, method.tensors(target, config)))
    by_path = {p.target.path: p for p in placements}
    for path, source in selection.tied.items():
        if path == source or path not in by_path or source not in by_path:
            continue
        method = by_path[path].rule
        names = method.tied(by_path[path].target, by_path[source].target, config)
        if names is None:
            refusals.append(Refusal(path, f"{method.name} cannot stay tied to {source}: drop ensure_weight_tying"))
            continue
        shared = {n: Shared(by_path[source].state_name(there), swap) for n, (there, swap) in names.items()}
        placements[placements.index(by_path[path])] = replace(by_path[path], shared=shared)
    targets = [p.target for p in placements]
    together = restacked(general.together(unstacked(targets, general), config), targets)
    placements = with_shared(together, placements)
    # owners first, so that whoever builds the tensors in order finds those that are shared
    return sorted(placements, key=lambda p: bool(p.shared)), refusals


def with_shared(together: Together, placements: list[Placement]) -> list[Placement]:
    """Adds the tensors that depend on all targets: shared ones belong to the first placement, the rest use them there."""
    result = {p.target.name: replace(p, tensors=p.tensors | together.own.get(p.target.name, {})) for p in placements}
    for shared, names in ((together.shared, tuple(result)), *together.grouped):
        for p in (result[name] for name in names):
            owner = result[names[0]]
            tensors = {n: replace(t, key=shared_key(t.key, p is owner)) for n, t in shared.items()} | p.tensors
            used = {} if p is owner else {n: Shared(owner.state_name(n)) for n in shared}
            result[p.target.name] = replace(p, tensors=tensors, shared=p.shared | used)
    return list(result.values())


def shared_key(key: str | None, owner: bool) -> str | None:
    """A key that begins with a dot is filed by each target; any other by the owner alone, without a module path."""
    if key is None or key.startswith("."):
        return key and key[1:]
    return f"{ROOT_KEY}{key}" if owner else None


def saved_placements(table: ModuleTable, selection: Selection, adapter: str, config: AdapterConfig) -> list[Placement]:
    """A copy of every parameter and persistent buffer of the modules to save, shared where the module shares it."""
    placements: list[Placement] = []
    sources: dict[str | None, dict[str, str]] = {}
    counts = wrap_counts(list(selection.targets))
    for saved in selection.saved:
        owners = dict(sources.get(saved.source, {}))
        for path, record in modules_inside(table, saved):
            for name, shape in (record.parameters | record.buffers).items():
                target = replace(whole_parameter(path, name, shape), file_path=inside_path(path, counts))
                placement = own_copy(adapter, target, config, trainable=name in record.parameters)
                full_name = f"{record.path}.{name}"
                tensor = min((full_name, *table.tied_to(full_name)))
                if tensor in owners:
                    placement = replace(placement, shared={"weight": Shared(owners[tensor])})
                else:
                    owners[tensor] = placement.state_name("weight")
                placements.append(placement)
        sources[saved.path] = owners
    return placements


def modules_inside(table: ModuleTable, saved: SavedModule) -> Iterator[tuple[str, ModuleRecord]]:
    """(path, record) of a saved module and the modules in it, aliases as often as they occur."""
    for record in table.records:
        for path in (record.path, *record.aliases):
            if inside(path, saved.path):
                yield path, record


def own_copy(adapter: str, target: Target, config: AdapterConfig, trainable: bool = True) -> Placement:
    method = get_method("SAVED")
    tensors = {name: replace(tensor, trainable=trainable) for name, tensor in method.tensors(target, config).items()}
    return Placement(adapter, method.name, target, config, tensors)


def bias_placements(table: ModuleTable, selection: Selection, adapter: str, config: AdapterConfig) -> list[Placement]:
    """Trained copies of the model's biases: all that are called `bias`, or those of adapted modules."""
    if config.bias == "none":
        return []
    targets = list(selection.targets)
    adapted, counts = {t.path for t in targets}, wrap_counts(targets)
    saved = [s.path for s in selection.saved]
    chosen = [
        whole_parameter(r.path, "bias", r.parameters["bias"])
        for r in table.records
        if "bias" in r.parameters
        and r.path
        and (config.bias == "all" or r.path in adapted)
        and not any(inside(path, s) for s in saved for path in (r.path, *r.aliases))
    ]
    return [own_copy(adapter, replace(t, file_path=base_path(t.path, counts)), config) for t in chosen]


def token_placements(selection: Selection, adapter: str, config: AdapterConfig) -> list[Placement]:
    """Trained embedding rows. Tied modules use the embedding's tensors, which are saved once, as PEFT does."""
    method = get_method("TOKENS")
    rows = {r.target.path: r.target for r in selection.tokens}
    return [token_placement(method, r, rows, adapter, config) for r in selection.tokens]


def token_placement(
    method: Method, rows: TokenRows, targets: dict[str, Target], adapter: str, config: Any
) -> Placement:
    # the config of the placement names the module, whichever way the recipe found it
    config = replace(config, trainable_token_indices={rows.target.path: list(rows.ids)})
    placement = Placement(adapter, method.name, rows.target, config, method.tensors(rows.target, config))
    if rows.source is None:
        return placement
    owner = replace(placement, target=targets[rows.source])
    return replace(
        placement,
        tensors={name: replace(tensor, key=None) for name, tensor in placement.tensors.items()},
        shared={name: Shared(owner.state_name(name)) for name in placement.tensors},
    )
