"""What could be adapted: the module table names what the captured graph reads, or says that only the graph can tell."""

import pytest
from families import FAMILIES, captured

from peft_fx.planning.modules import module_table
from peft_fx.planning.possible import possible_targets, undecided
from peft_fx.target import ModuleRecord, ModuleTable
from peft_fx.verbs.explain import possible

# what a table leaves open, by the ends of its names
OPEN = {
    "mixtral": {"gate_up_proj", "down_proj", "gate.weight"},
    "vit": {"cls_token", "position_embeddings"},
    "mamba": {"A_log"},
    "t5": {"shared.weight", "embed_tokens.weight", "lm_head.weight"},
    "t5 labels": {"shared.weight", "embed_tokens.weight", "lm_head.weight"},
    "bart": {"shared.weight", "embed_tokens.weight", "lm_head.weight"},
    "conv 1d": {"up.weight"},
}


def cases():
    return [pytest.param(n, marks=[pytest.mark.slow] if f.slow else [], id=n) for n, f in FAMILIES.items()]


@pytest.mark.parametrize("name", cases())
def test_a_table_lists_what_the_graph_reads_or_leaves_it_open(name):
    model, graph = captured(FAMILIES[name])
    table = module_table(model)
    read = {(r.target, r.kind, r.shape) for r in possible(graph).rows}
    named = {(t.name, t.kind, t.shape) for t in possible_targets(table) if t.kind != "norm"}
    left_open = undecided(table)
    assert {t for t in read if t[0] not in left_open} == {t for t in named if t[0] not in left_open}
    assert all(n.endswith(tuple(OPEN.get(name, ()))) for n in left_open) and bool(left_open) == (name in OPEN)


def table_of(*tied, **modules):
    """Modules called by their names: (class, parameters)."""
    records = [ModuleRecord(path, kind, (kind,), shapes) for path, (kind, shapes) in modules.items()]
    return ModuleTable(tuple(records), tied=tied)


WEIGHT = {"weight": (4, 4)}
TABLES = {
    "known": (table_of(a=("Linear", WEIGHT), b=("Embedding", WEIGHT)), set()),
    "vectors": (table_of(a=("Scale", {"weight": (4,)})), set()),
    "unknown": (table_of(a=("Router", WEIGHT), b=("Linear", WEIGHT)), {"a.weight"}),
    "beside a known one": (table_of(a=("Linear", {**WEIGHT, "gain": (4, 4)})), {"a.gain"}),
    "tied, two classes": (table_of(("a.weight", "b.weight"), a=("Linear", WEIGHT), b=("Embedding", WEIGHT)), set()),
    "tied, one class": (
        table_of(("a.weight", "b.weight"), a=("Embedding", WEIGHT), b=("Embedding", WEIGHT)),
        {"a.weight", "b.weight"},
    ),
    "top level": (ModuleTable((ModuleRecord("", "Net", ("Net",), {"w": (4, 4)}),)), {"w"}),
    "tied at the top": (
        table_of(("w", "a.weight"), **{"": ("Net", {"w": (4, 4)}), "a": ("Linear", WEIGHT)}),
        {"w"},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_a_table_leaves_open(name):
    table, expected = TABLES[name]
    assert undecided(table) == expected
