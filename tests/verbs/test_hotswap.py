"""Swapping adapters in place: the numbers of another adapter, no recompile, and nothing at all if it cannot be done."""

import json
import shutil

import peft
import pytest
import torch
from graphs import bits, captured, folder_of, gradients, loss_of, model_of, output, same_bits, tuned
from marks import quick
from safetensors.torch import load_file, save_file

import peft_fx
from peft_fx.errors import AdapterFileError, GraphError, HotswapError, PeftFxError
from peft_fx.store.state import state_of

RANK = 8
LINEARS = ["q_proj", "v_proj", "down_proj"]
MIXED = ["embed", "conv", "turned", "plain", "head"]
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}

# What a slot is made of -> adapters that go into it, one after the other.
SLOTS = {
    "llama": {"target_modules": LINEARS, "r": 4},
    "mixed": {"target_modules": MIXED, "r": 4},
    "mixtral": {**EXPERTS, "r": 4},
}
ADAPTERS = {
    "llama": [
        {"r": 8},
        {"r": 2, "lora_alpha": 16},
        {"r": 3, "use_rslora": True},
        {"r": 4, "alpha_pattern": {"q_proj": 32, "layers.1.mlp.down_proj": 1}},
        {"r": 2, "rank_pattern": {"v_proj": 7, "layers.0.self_attn.q_proj": 1}},
        {"r": 5, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 3.5}, "use_rslora": True},
        {"r": 1, "target_modules": ["q_proj"]},
        {"r": 8, "target_modules": r".*layers\.1.*(q|v)_proj"},
        {"r": 6},
        {"r": 4, "layers_to_transform": [0]},
    ],
    "mixed": [
        {"r": 8},
        {"r": 2, "use_rslora": True},
        {"r": 4, "rank_pattern": {"conv": 2, "embed": 1}, "alpha_pattern": {"turned": 1}},
        {"r": 6, "target_modules": ["conv", "embed"]},
        {"r": 4},
    ],
    "mixtral": [
        {"r": 1},
        {"r": 8, "lora_alpha": 2},
        {"r": 3, "target_parameters": ["mlp.experts.down_proj"]},
        {"r": 5, "use_rslora": True},
    ],
}  # fmt: skip


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def full(name, config):
    return {**{k: v for k, v in SLOTS[name].items() if k != "r"}, **config}


@pytest.fixture(scope="module", params=quick(SLOTS, "llama", "mixed"))
def family(request, tmp_path_factory):
    """A model's name and the folders of its adapters."""
    name = request.param
    root = tmp_path_factory.mktemp(name)
    folders = [
        folder_of(root / str(i), captured(name), full(name, config), seed=i) for i, config in enumerate(ADAPTERS[name])
    ]
    return name, folders


def slot(name, **more):
    return peft_fx.prepare_hotswap(tuned(captured(name), {**SLOTS[name], **more}, seed=99), max_rank=RANK)


def compiled(graph, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(graph, backend=backend, fullgraph=True)


def test_twenty_swaps_of_any_rank_and_scale_equal_a_fresh_load_and_recompile_nothing(family):
    name, folders = family
    graph = slot(name)
    run = compiled(graph)
    with torch.no_grad():
        output(run, name)
        with torch.compiler.set_stance("fail_on_recompile"):
            for i in range(20):
                folder = folders[i % len(folders)]
                report = peft_fx.hotswap(run if i % 2 else graph, folder)
                close(output(run, name), output(peft_fx.load_adapter(captured(name), folder), name))
                assert report.tensors and report.elements


def step(run, optimizer, name):
    """One optimiser step; the loss and the gradients before it."""
    loss = loss_of(run, name)
    loss.backward()
    found = {n.removeprefix("_orig_mod."): g.clone() for n, g in gradients(run).items()}
    optimizer.step()
    optimizer.zero_grad()
    return loss, found


@pytest.mark.slow
def test_training_goes_on_between_swaps_without_recompiling(family):
    name, folders = family
    graph = slot(name)
    run = compiled(graph)
    optimizer = torch.optim.AdamW([p for p in graph.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    loss_of(run, name).backward()
    optimizer.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        for folder in folders:
            peft_fx.hotswap(run, folder)
            optimizer.state.clear()
            fresh = peft_fx.load_adapter(captured(name), folder, trainable=True)
            first = step(run, optimizer, name)
            expected = loss_of(fresh, name)
            expected.backward()
            close(first[0], expected)
            for parameter, gradient in gradients(fresh).items():
                close(first[1][parameter].norm(), gradient.norm())
            assert step(run, optimizer, name)[0] < expected


@pytest.mark.slow
def test_swaps_hold_under_inductor_in_inference_and_training(tmp_path):
    graph = slot("mixed")
    run = compiled(graph, "inductor")
    with torch.no_grad():
        output(run, "mixed")
    loss_of(run, "mixed").backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for i, config in enumerate(ADAPTERS["mixed"]):
            folder = folder_of(tmp_path / str(i), captured("mixed"), full("mixed", config), seed=i)
            peft_fx.hotswap(run, folder)
            fresh = peft_fx.load_adapter(captured("mixed"), folder)
            with torch.no_grad():
                close(output(run, "mixed"), output(fresh, "mixed"))
            loss = loss_of(run, "mixed")
            close(loss, loss_of(fresh, "mixed"))
            loss.backward()


def test_prepare_hotswap_changes_no_output_and_leaves_its_input_alone(family):
    name, folders = family
    first = tuned(captured(name), SLOTS[name])
    before, old = output(first, name), bits(first)
    wide = peft_fx.prepare_hotswap(first, max_rank=RANK)
    close(output(wide, name), before)
    peft_fx.hotswap(wide, folders[0])
    assert same_bits(bits(first), old) and torch.equal(output(first, name), before)
    assert state_of(first).recipe["default"].config.r == SLOTS[name]["r"]
    assert not any(p.requires_grad for n, p in wide.named_parameters() if not n.startswith("peft_fx."))


def test_zero_padded_parts_stay_zero_through_training_with_weight_decay(family):
    name, folders = family
    graph = slot(name)
    for config, folder in zip(ADAPTERS[name], folders, strict=True):
        assert peft_fx.hotswap(graph, folder).padded or config["r"] == RANK
        optimizer = torch.optim.AdamW([p for p in graph.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(graph, name).backward()
            optimizer.step()
        saved = peft_fx.save_adapter(graph, folder.parent / "trained")  # refuses if numbers beyond the rank moved
        close(output(peft_fx.load_adapter(captured(name), saved), name), output(graph, name))


def test_a_saved_adapter_after_a_swap_is_the_one_swapped_in(family, tmp_path):
    name, folders = family
    graph = slot(name)
    for config, folder in zip(ADAPTERS[name], folders, strict=True):
        peft_fx.hotswap(graph, folder)
        again = peft_fx.save_adapter(graph, tmp_path / "again")
        ours, theirs = load_file(again / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
        if "target_modules" in config or "target_parameters" in config or "layers_to_transform" in config:
            assert ours.keys() > theirs.keys()  # targets that the adapter leaves out are written with a zero update
        else:
            assert ours.keys() == theirs.keys()
            assert (again / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        close(output(peft_fx.load_adapter(captured(name), again), name), output(graph, name))


def test_numbers_that_an_old_momentum_moved_beyond_the_rank_are_not_dropped_on_saving(tmp_path):
    graph = slot("mixed")
    optimizer = torch.optim.AdamW([p for p in graph.parameters() if p.requires_grad], lr=0.1)
    peft_fx.hotswap(graph, folder_of(tmp_path / "wide", captured("mixed"), full("mixed", {"r": 8})))
    loss_of(graph, "mixed").backward()
    optimizer.step()
    peft_fx.hotswap(graph, folder_of(tmp_path / "narrow", captured("mixed"), full("mixed", {"r": 2})))
    optimizer.step()
    with pytest.raises(GraphError, match="clear optimizer.state"):
        peft_fx.save_adapter(graph, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prepared_swap_is_a_copy_that_can_be_made_again_and_again(family):
    name, folders = family
    graph = slot(name)
    run = compiled(graph)
    swaps = [peft_fx.prepare_swap(graph, folder) for folder in folders[:3]]
    with torch.no_grad():
        output(run, name)
        with torch.compiler.set_stance("fail_on_recompile"):
            for i in (0, 2, 1, 0):
                assert peft_fx.hotswap(run, swaps[i]).source == str(folders[i])
                close(output(run, name), output(peft_fx.load_adapter(captured(name), folders[i]), name))


def test_a_prepared_swap_is_refused_by_another_graph_and_after_a_merge(tmp_path):
    graph = tuned(captured("mixed"), {"target_modules": ["plain"]})
    peft_fx.save_adapter(graph, tmp_path)
    swap = peft_fx.prepare_swap(graph, tmp_path)
    other = tuned(captured("mixed"), {"target_modules": ["plain"]}, seed=1)
    for wrong in (other, peft_fx.merge(graph)):
        before = bits(wrong)
        with pytest.raises(HotswapError, match="prepared for another graph, or before a merge"):
            peft_fx.hotswap(wrong, swap)
        assert same_bits(before, bits(wrong))
    with pytest.raises(HotswapError, match="is merged: swap it from its folder"):
        peft_fx.prepare_swap(peft_fx.merge(graph), tmp_path)


def test_targets_left_out_become_zero_and_a_full_adapter_comes_back(family):
    name, folders = family
    graph, base = slot(name), captured(name)
    partial = {
        n: i
        for i, n in enumerate(map(str, folders))
        if len(ADAPTERS[name][i].keys() & {"target_modules", "target_parameters"})
    }
    for folder, _i in partial.items():
        report = peft_fx.hotswap(graph, folder)
        assert report.zeroed
        close(output(graph, name), output(peft_fx.load_adapter(base, folder), name))
        # ... in graphs derived after the swap too
        close(output(peft_fx.set_adapter(graph, "default"), name), output(graph, name))
        assert peft_fx.hotswap(graph, folders[0]).zeroed == ()
        close(output(graph, name), output(peft_fx.load_adapter(base, folders[0]), name))


def test_graphs_that_share_an_adapter_all_see_the_swap(tmp_path):
    first = slot("llama")
    second = peft_fx.apply(first, {"peft_type": "LORA", "r": 2, "target_modules": ["o_proj"]}, "other")
    back = peft_fx.set_adapter(second, "default")
    folder = folder_of(tmp_path / "a", captured("llama"), full("llama", {"r": 3}), seed=5)
    peft_fx.hotswap(back, folder)
    expected = output(peft_fx.load_adapter(captured("llama"), folder), "llama")
    for graph in (first, back, peft_fx.set_adapter(second, "default")):
        close(output(graph, "llama"), expected)
        assert state_of(graph).recipe["default"].config.r == 3


def test_merging_after_a_swap_merges_the_new_numbers(family):
    name, folders = family
    graph = slot(name)
    for folder in folders[:3]:
        peft_fx.hotswap(graph, folder)
        close(output(peft_fx.merge(graph), name), output(graph, name))


# Whole modules, biases and token rows ----------------------------------------------------------------------------------

SUBSTITUTIONS = [
    ("mixed", {"target_modules": ["plain"], "modules_to_save": ["head", "norm"]}),
    ("mixed", {"target_modules": ["turned"], "bias": "all"}),
    ("mixed", {"target_modules": ["turned", "head"], "bias": "lora_only"}),
    ("mixed", {"target_modules": ["head"], "lora_bias": True}),
    ("mixed", {"target_modules": ["plain"], "trainable_token_indices": {"embed": [1, 7]}}),
    ("tied_llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    ("tied_llama", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
]  # fmt: skip


@pytest.mark.parametrize("name, config", SUBSTITUTIONS, ids=str)
def test_saved_modules_biases_and_token_rows_are_swapped_too(name, config, tmp_path):
    graph = tuned(captured(name), {"r": 4, **config}, seed=1)
    folder = folder_of(tmp_path / "a", captured(name), {"r": 4, "lora_alpha": 3, **config}, seed=2)
    expected = output(peft_fx.load_adapter(captured(name), folder), name)
    assert not torch.allclose(output(graph, name), expected, atol=1e-3)
    peft_fx.hotswap(graph, folder)
    close(output(graph, name), expected)


def test_token_rows_move_to_other_ids(tmp_path):
    graph = tuned(captured("mixed"), {"target_modules": ["plain"], "trainable_token_indices": {"embed": [1, 7]}})
    folder = folder_of(
        tmp_path / "a",
        captured("mixed"),
        {"target_modules": ["plain"], "trainable_token_indices": {"embed": [4, 9]}},
        2,
    )
    peft_fx.hotswap(graph, folder)
    close(output(graph, "mixed"), output(peft_fx.load_adapter(captured("mixed"), folder), "mixed"))


def test_an_adapter_of_peft_is_swapped_in(tmp_path):
    model = peft.get_peft_model(
        model_of("llama"), peft.LoraConfig(r=5, target_modules=LINEARS, init_lora_weights=False)
    ).eval()
    model.save_pretrained(tmp_path)
    graph = slot("llama")
    peft_fx.hotswap(graph, tmp_path)
    close(output(graph, "llama"), output(model, "llama"))


# Refusals ----------------------------------------------------------------------------------------------------------------

REFUSALS = {
    "a larger rank": ({"target_modules": LINEARS, "r": 16}, HotswapError, "prepare_hotswap"),
    "a larger rank on one target": ({"target_modules": LINEARS, "r": 2, "rank_pattern": {"v_proj": 9}}, HotswapError, r"v_proj.*prepare_hotswap"),
    "more targets": ({"target_modules": [*LINEARS, "o_proj"], "r": 4}, HotswapError, "o_proj.*the resident adapter has no LORA there"),
    "other targets": ({"target_modules": ["o_proj"], "r": 4}, HotswapError, "o_proj.*the resident adapter has no LORA there"),
    "dropout": ({"target_modules": LINEARS, "r": 4, "lora_dropout": 0.1}, HotswapError, "dropout"),
    "a bias more": ({"target_modules": LINEARS, "r": 4, "lora_bias": True}, HotswapError, "tensors"),
    "a module to save": ({"target_modules": LINEARS, "r": 4, "modules_to_save": ["norm"]}, HotswapError, "model.norm.weight: the resident adapter has no SAVED there"),
    "token rows": ({"target_modules": LINEARS, "r": 4, "trainable_token_indices": [1]}, HotswapError, "embed_tokens"),
}  # fmt: skip


@pytest.fixture(scope="module")
def resident():
    return slot("llama")


def refused(graph, folder, error, match, adapter="default"):
    """A swap that fails and changes no bit of any tensor, nor the recipe."""
    before, config = bits(graph), state_of(graph).recipe["default"].config
    outputs = output(graph, "llama")
    with pytest.raises(error, match=match):
        peft_fx.hotswap(graph, folder, adapter)
    assert same_bits(bits(graph), before)
    assert state_of(graph).recipe["default"].config is config
    assert torch.equal(output(graph, "llama"), outputs)


@pytest.mark.parametrize("case", REFUSALS)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(case, resident, tmp_path):
    config, error, match = REFUSALS[case]
    refused(resident, folder_of(tmp_path / "a", captured("llama"), config), error, match)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop(tensors):
    del tensors[next(iter(tensors))]


def widen(tensors):
    key = next(iter(tensors))
    tensors[key] = torch.cat([tensors[key], tensors[key]])


CORRUPTIONS = {
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "config cut off": lambda f: (f / "adapter_config.json").write_text('{"peft_type"'),
    "another method": lambda f: edit_config(f, peft_type="IA3"),
    "a rank that the tensors do not have": lambda f: edit_config(f, r=3),
    "a rank that is no number": lambda f: edit_config(f, r="8"),
    "targets that are not there": lambda f: edit_config(f, target_modules=["nowhere"]),
    "no tensors": lambda f: (f / "adapter_model.safetensors").unlink(),
    "tensors cut off": lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
    "a header of noise": lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64),
    "a tensor missing": lambda f: edit_tensors(f, drop),
    "a tensor too large": lambda f: edit_tensors(f, widen),
    "a tensor of integers": lambda f: edit_tensors(f, lambda t: t.update({k: v.int() for k, v in t.items()})),
    "a tensor too many": lambda f: edit_tensors(f, lambda t: t.update(more=torch.zeros(2))),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("sound") / "a", captured("llama"), full("llama", {"r": 4}))


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_a_damaged_file_is_refused_and_changes_nothing(case, resident, sound, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(sound, folder)
    CORRUPTIONS[case](folder)
    refused(resident, folder, PeftFxError, None)


def test_unknown_adapters_and_folders_are_refused(resident, sound, tmp_path):
    refused(resident, sound, GraphError, "resident: default", adapter="missing")
    refused(resident, tmp_path / "nowhere", AdapterFileError, "no such folder")


def test_leaving_out_a_saved_module_is_refused(sound):
    graph = tuned(captured("llama"), {**full("llama", {"r": 4}), "modules_to_save": ["lm_head"]})
    refused(graph, sound, HotswapError, "lm_head.weight: the new adapter leaves it out, and SAVED has no neutral value")


def test_fewer_token_rows_are_refused_without_a_useless_remedy(tmp_path):
    graph = tuned(captured("mixed"), {"target_modules": ["plain"], "trainable_token_indices": {"embed": [1, 7]}})
    folder = folder_of(
        tmp_path / "a", captured("mixed"), {"target_modules": ["plain"], "trainable_token_indices": {"embed": [1]}}
    )
    before = bits(graph)
    with pytest.raises(HotswapError, match="does not fit the slot") as info:
        peft_fx.hotswap(graph, folder)
    assert "prepare_hotswap" not in str(info.value) and same_bits(bits(graph), before)


def test_equal_layers_are_refused_in_one_line(tmp_path):
    wide = folder_of(tmp_path / "a", captured("llama"), {"target_modules": ["q_proj"], "r": 8})
    with pytest.raises(HotswapError) as info:
        peft_fx.hotswap(tuned(captured("llama"), {"target_modules": ["q_proj"], "r": 4}), wide)
    _, *lines = str(info.value).splitlines()
    names = [f"  model.layers.{{0..1}}.self_attn.q_proj.weight.lora_{f}: shape [" for f in "AB"]
    assert len(lines) == 2 and all(map(str.startswith, lines, names))


def test_an_adapter_tied_otherwise_is_refused(tmp_path):
    config = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 4}
    tied = tuned(captured("tied_llama"), {**config, "ensure_weight_tying": True})
    loose = tuned(captured("tied_llama"), config)
    for graph, other in ((tied, loose), (loose, tied)):
        before, folder = bits(graph), peft_fx.save_adapter(other, tmp_path / "a")
        with pytest.raises(HotswapError, match="ties"):
            peft_fx.hotswap(graph, folder)
        assert same_bits(bits(graph), before)


def test_a_merged_slot_is_not_widened(resident):
    with pytest.raises(GraphError, match="unmerge"):
        peft_fx.prepare_hotswap(peft_fx.merge(resident), max_rank=16)


def test_inductor_freezing_is_refused(resident, sound):
    with torch._inductor.config.patch(freezing=True):
        refused(resident, sound, HotswapError, "freezing")


def test_a_rank_above_max_rank_is_refused():
    with pytest.raises(HotswapError, match="larger than max_rank=2"):
        peft_fx.prepare_hotswap(tuned(captured("mixed"), SLOTS["mixed"]), max_rank=2)


def test_a_max_rank_that_a_grouped_convolution_cannot_have_is_refused():
    with pytest.raises(HotswapError, match="not divisible by groups=2"):
        peft_fx.prepare_hotswap(tuned(captured("mixed"), SLOTS["mixed"]), max_rank=7)


def test_a_swap_writes_what_follows_from_the_config_whatever_was_there(sound):
    graph = tuned(captured("llama"), SLOTS["llama"])
    scalings = [b for n, b in graph.named_buffers() if n.endswith(".scaling")]
    for scaling in scalings:
        scaling.fill_(7.0)
    for _ in range(2):
        peft_fx.hotswap(graph, sound)
        assert scalings and {s.item() for s in scalings} == {8 / 4}
        scalings[0].fill_(7.0)


def test_a_swap_between_forward_and_backward_makes_backward_raise(sound):
    graph = tuned(captured("llama"), SLOTS["llama"])
    loss = loss_of(graph, "llama")
    peft_fx.hotswap(graph, sound)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss_of(graph, "llama").backward()
