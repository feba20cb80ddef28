"""Hotswap of a merged adapter: the weights folded anew in place, as if the new adapter had been merged from the start."""

import copy

import conformance as c
import pytest
import torch
from methods import MODULES, cells, label

import peft_fx as fx
from peft_fx.methods import get_method
from peft_fx.store.state import state_of

pytestmark = pytest.mark.slow

LORA = {"peft_type": "LORA", "r": 2, "init_lora_weights": False}
LAYER = {"target_modules": ["layer"]}
# One adapter of each method that can be merged: its first cell on a plain linear layer, or else its first cell.
ALL = [x for x in cells("PEFT") + cells("DEFINED") if not get_method(x[0]).no_weight]
FIRST = [next((x for x in ALL if x[0] == n and x[2] == "wide"), None) or next(x for x in ALL if x[0] == n)
         for n in MODULES if any(x[0] == n for x in ALL)]  # fmt: skip
WIDE = [x for x in FIRST if x[2] == "wide"]
LLAMA = [
    {**LORA, "target_modules": ["q_proj", "v_proj"]},
    {**LORA, "r": 5, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ["down_proj"]},
    {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    {**LORA, "target_modules": "all-linear", "lora_alpha": 5},
    {"peft_type": "LOHA", "r": 3, "target_modules": ["o_proj"]},
]


def bits(graph):
    named = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    return {name: (t, t.detach().clone()) for name, t in named}


def unchanged(before, after):
    assert before.keys() == after.keys()
    for name, (tensor, old) in before.items():
        assert tensor is after[name][0] and torch.equal(old, after[name][1]), name


def adapter(subject, config, folder, seed=3):
    tuned = fx.apply(c.captured(subject), config)
    c.randomise(tuned, seed)
    fx.save_adapter(tuned, folder)
    return folder


def loaded(subject, folder, name="default"):
    return fx.load_adapter(c.captured(subject), folder, name)


def same(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def is_merged_as(graph, subject, folder, tmp_path):
    """Bits, file and unmerged form are those of merging the adapter in `folder` from the start."""
    fresh = loaded(subject, folder)
    expected = fx.merge(fresh)
    same(c.run(graph, subject), c.run(expected, subject))
    ours = {n: t for n, t in graph.state_dict().items() if torch.count_nonzero(t)}
    theirs = {n: t for n, t in expected.state_dict().items() if torch.count_nonzero(t)}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert state_of(graph).merge_report == state_of(expected).merge_report
    assert str(fx.explain(graph)) == str(fx.explain(expected))
    back = fx.unmerge(graph)
    same(c.run(back, subject), c.run(fresh, subject))
    base = c.captured(subject).state_dict()
    assert all(torch.equal(t, base[n]) for n, t in back.state_dict().items() if not n.startswith("peft_fx."))
    file = c.saved(lambda f: fx.save_adapter(graph, f))
    expected_file = c.saved(lambda f: fx.save_adapter(fresh, f))
    assert file.keys() == expected_file.keys() and all(torch.equal(file[k], expected_file[k]) for k in file)


@pytest.mark.parametrize("cell", WIDE, ids=label)
def test_any_method_gives_way_to_the_next_with_the_bits_of_merging_it(cell, tmp_path):
    following = WIDE[(WIDE.index(cell) + 1) % len(WIDE)]
    first = adapter("wide", cell[1], tmp_path / "a")
    second = adapter("wide", following[1], tmp_path / "b", 5)
    graph = fx.merge(loaded("wide", first))
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    c.run(compiled, "wide")
    with torch.compiler.set_stance("fail_on_recompile"):
        for folder in (second, first):
            before = {n: t for n, t in graph.named_parameters()}
            report = fx.hotswap(compiled, folder)
            assert report.tensors and report.elements
            same(c.run(compiled, "wide"), c.run(fx.merge(loaded("wide", folder)), "wide"))
            is_merged_as(graph, "wide", folder, tmp_path)
            folded = {r["target"] for r in state_of(graph).merge_report}
            assert all(t is before[n] for n, t in graph.named_parameters() if n in folded and n != "layer.bias")


@pytest.mark.parametrize("keep_base", ["device", "cpu"])
@pytest.mark.parametrize("compiled", [None, "user", "ours"], ids=str)
def test_other_targets_and_ranks_recompile_nothing(keep_base, compiled, tmp_path):
    folders = [adapter("llama", x, tmp_path / str(i), i) for i, x in enumerate(LLAMA)]
    tuned = loaded("llama", folders[0])
    untouched = bits(tuned)
    graph = call = fx.merge(tuned, keep_base=keep_base)
    if compiled == "user":
        call = torch.compile(graph, fullgraph=True, backend="aot_eager")
    elif compiled == "ours":
        call = fx.compile(graph, backend="aot_eager")
    c.run(call, "llama")
    old = set(state_of(loaded("llama", folders[0])).recipe)
    with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
        for folder in (*folders[1:], folders[0]):
            report = fx.hotswap(call, folder)
            same(c.run(graph, "llama"), c.run(fx.merge(loaded("llama", folder)), "llama"))
            assert c.error(c.run(call, "llama"), c.run(graph, "llama")) <= 1e-6
            assert set(report.zeroed).isdisjoint(r["target"] for r in state_of(graph).merge_report)
            if compiled == "ours":
                assert state_of(call).merge_report == state_of(graph).merge_report
    assert report.zeroed and old == {"default"}
    is_merged_as(graph, "llama", folders[0], tmp_path)
    same(c.run(fx.unmerge(getattr(call, "_orig_mod", call)), "llama"), c.run(fx.unmerge(graph), "llama"))
    unchanged(untouched, bits(tuned))


def test_one_of_several_merged_adapters_is_swapped_in_its_place(tmp_path):
    a = adapter("llama", LLAMA[0], tmp_path / "a")
    b = adapter("llama", LLAMA[1], tmp_path / "b", 4)
    both = fx.load_adapter(loaded("llama", a, "a"), b, "b")
    graph = fx.merge(both, ["b", "a"])
    for i, name in ((2, "b"), (3, "a"), (4, "b")):
        new = adapter("llama", LLAMA[i], tmp_path / str(i), i)
        fx.hotswap(graph, new, name)
        now = {"a": a, "b": b} | {name: new}
        a, b = now["a"], now["b"]
        expected = fx.merge(fx.load_adapter(loaded("llama", a, "a"), b, "b"), ["b", "a"])
        same(c.run(graph, "llama"), c.run(expected, "llama"))
        assert state_of(graph).merge_report == state_of(expected).merge_report
    one = fx.load_adapter(loaded("llama", a, "a"), b, "b")
    same(c.run(fx.unmerge(graph), "llama"), c.run(one, "llama"))


def test_an_active_adapter_beside_a_merged_one_stays(tmp_path):
    a, b, new = (adapter("llama", LLAMA[i], tmp_path / str(i), i) for i in (0, 4, 5))
    both = fx.load_adapter(loaded("llama", a, "a"), b, "b")
    graph = fx.merge(fx.set_adapter(both, ["a", "b"]), "a")
    fx.hotswap(graph, new, "a")
    expected = fx.merge(fx.set_adapter(fx.load_adapter(loaded("llama", new, "a"), b, "b"), ["a", "b"]), "a")
    same(c.run(graph, "llama"), c.run(expected, "llama"))
    other = adapter("llama", {**LLAMA[4], "r": 1}, tmp_path / "other", 9)
    fx.hotswap(graph, other, "b")
    expected = fx.merge(fx.set_adapter(fx.load_adapter(loaded("llama", new, "a"), other, "b"), ["a", "b"]), "a")
    assert c.error(c.run(graph, "llama"), c.run(expected, "llama")) <= 1e-6


def test_a_deep_copy_is_swapped_alone(tmp_path):
    a, b = (adapter("llama", LLAMA[i], tmp_path / str(i), i) for i in (0, 4))
    graph = fx.merge(loaded("llama", a))
    before = bits(graph)
    twin = copy.deepcopy(graph)
    fast = fx.outline(twin)
    fx.hotswap(fast, b)
    unchanged(before, bits(graph))
    same(c.run(graph, "llama"), c.run(fx.merge(loaded("llama", a)), "llama"))
    for swapped in (twin, fast):
        same(c.run(swapped, "llama"), c.run(fx.merge(loaded("llama", b)), "llama"))
    is_merged_as(twin, "llama", b, tmp_path)


def test_what_is_smaller_is_padded_a_bias_by_zero_and_groups_by_zeros_between_them(tmp_path):
    subject = "wide_without_bias"
    folders = [adapter(subject, x, tmp_path / str(i), i) for i, x in enumerate(
        ({"peft_type": "BEFT", **LAYER}, {**LORA, **LAYER}))]  # fmt: skip
    graph = fx.merge(loaded(subject, folders[0]))
    assert fx.hotswap(graph, folders[1]).padded == 1
    is_merged_as(graph, subject, folders[1], tmp_path)
    fx.hotswap(graph, folders[0])
    is_merged_as(graph, subject, folders[0], tmp_path)
    subject = "wide_conv2d_grouped"
    lora = adapter(subject, {**LORA, "r": 4, **LAYER}, tmp_path / "lora")
    grouped = adapter(subject, {"peft_type": "HRA", "r": 2, **LAYER}, tmp_path / "hra")
    graph = fx.merge(loaded(subject, lora))
    assert fx.hotswap(graph, grouped).padded == 1
    assert c.error(c.run(graph, subject), c.run(loaded(subject, grouped), subject)) <= 1e-6
    same(c.run(fx.unmerge(graph), subject), c.run(loaded(subject, grouped), subject))
    fx.hotswap(graph, lora)
    is_merged_as(graph, subject, lora, tmp_path)


TIED = {**LORA, "target_modules": ["embed_tokens"]}
REFUSALS = {
    "a bias more": ("wide_without_bias", {**LORA, **LAYER}, {"peft_type": "BEFT", **LAYER}, "layer.bias: the folded operator has no bias"),
    "groups dropped": ("wide_conv2d_grouped", {"peft_type": "HRA", "r": 2, **LAYER}, {**LORA, "r": 4, **LAYER}, "groups=2, across which"),
    "a tie undone": ("tied_llama", {**LORA, "target_modules": ["q_proj"]}, TIED, "tied to lm_head.weight.*untie=True"),
    "no weight": ("square", {**LORA, **LAYER}, {"peft_type": "LILY", "r": 4, **LAYER}, "LILY cannot be merged"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_needs_other_operators_is_refused_and_changes_nothing(case, tmp_path):
    subject, old, new, match = REFUSALS[case]
    graph = fx.merge(loaded(subject, adapter(subject, old, tmp_path / "a")))
    folder = adapter(subject, new, tmp_path / "b")
    before, state = bits(graph), state_of(graph)
    with pytest.raises(fx.HotswapError, match=f"nothing was changed.*{match}"):
        fx.hotswap(graph, folder)
    unchanged(before, bits(graph))
    assert state_of(graph) is state


def test_numbers_that_are_not_finite_are_refused_and_change_nothing(tmp_path):
    graph = fx.merge(loaded("llama", adapter("llama", LLAMA[4], tmp_path / "a")))
    folder = adapter("llama", LLAMA[4], tmp_path / "b", 4)
    before = bits(graph)
    c.rewrite(folder, lambda tensors: {**tensors, list(tensors)[-1]: list(tensors.values())[-1] * float("inf")})
    with pytest.raises(fx.HotswapError, match="inf or nan"):
        fx.hotswap(graph, folder)
    c.rewrite(folder, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(fx.AdapterFileError, match="missing"):
        fx.hotswap(graph, folder)
    unchanged(before, bits(graph))


def test_base_weights_that_were_not_kept_are_refused_with_the_remedy(tmp_path):
    folder = adapter("wide", {**LORA, **LAYER}, tmp_path / "a")
    graph = fx.merge(loaded("wide", folder), keep_base=None)
    fx.export(graph, tmp_path / "graph.pt2")
    for g in (graph, fx.load(tmp_path / "graph.pt2")):
        with pytest.raises(fx.HotswapError, match="keep_base='device' or 'cpu'"):
            fx.hotswap(g, folder)


def test_a_weight_untied_by_the_merge_takes_other_adapters(tmp_path):
    a, b = (adapter("tied_llama", {**TIED, "r": r}, tmp_path / str(r), r) for r in (2, 3))
    graph = fx.merge(loaded("tied_llama", a), untie=True)
    fx.hotswap(graph, b)
    same(c.run(graph, "tied_llama"), c.run(fx.merge(loaded("tied_llama", b), untie=True), "tied_llama"))
    back = fx.unmerge(graph)
    assert back.get_parameter("lm_head.weight") is back.get_parameter("model.embed_tokens.weight")


def test_both_names_of_a_tie_stay_one_tensor(tmp_path):
    config = {**LORA, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    q = adapter("tied_llama", {**LORA, "target_modules": ["q_proj"]}, tmp_path / "q")
    both = [adapter("tied_llama", {**config, "r": r}, tmp_path / str(r), r) for r in (2, 3)]
    graph = fx.merge(loaded("tied_llama", q))
    for folder in (*both, q, both[0]):
        fx.hotswap(graph, folder)
        assert graph.get_parameter("lm_head.weight") is graph.get_parameter("model.embed_tokens.weight")
        is_merged_as(graph, "tied_llama", folder, tmp_path)


def test_trained_biases_modules_and_token_rows_are_folded_too(tmp_path):
    configs = [
        {**LORA, "target_modules": ["q_proj"]},
        {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {**LORA, "target_modules": ["q_proj"], "bias": "all"},
        {**LORA, "target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
    ]
    folders = [adapter("biased_llama", x, tmp_path / str(i), i) for i, x in enumerate(configs)]
    graph = fx.merge(loaded("biased_llama", folders[0]))
    for folder in (*folders[1:], folders[0]):
        fx.hotswap(graph, folder)
        is_merged_as(graph, "biased_llama", folder, tmp_path)


def test_whether_the_adapter_trains_is_kept(tmp_path):
    a, b = (adapter("llama", LLAMA[i], tmp_path / str(i)) for i in (0, 4))
    for trainable in (True, False):
        graph = fx.merge(fx.load_adapter(c.captured("llama"), a, trainable=trainable))
        fx.hotswap(graph, b)
        assert not any(p.requires_grad for p in graph.parameters())
        own = [p for n, p in fx.unmerge(graph).named_parameters() if n.startswith("peft_fx.")]
        assert own and all(p.requires_grad is trainable for p in own)


def test_a_merged_slot_takes_another_adapter(tmp_path):
    a, b, new = (adapter("llama", LLAMA[i], tmp_path / str(i), i) for i in (0, 4, 2))
    both = fx.load_adapter(loaded("llama", a, "a"), b, "b")
    graph = fx.merge(fx.reserve(both, slots=3), "b")
    fx.hotswap(graph, new, "b")
    on = fx.merge(fx.set_adapter(fx.load_adapter(loaded("llama", a, "a"), new, "b"), ["a", "b"]), "b")
    assert c.error(c.run(graph, "llama"), c.run(on, "llama")) <= 1e-6
    assert {r.adapter for r in fx.explain(graph).rows if r.status == "merged"} == {"b"}
