"""Packages: compiled ahead of time, run without the model's code, adapters swapped inside. Compiling one takes 10 to 40 s."""

import copy
import json
import subprocess
import sys
import threading
import types
import zipfile

import methods
import pytest
import torch
from graphs import captured, folder_of, inputs, model_of, output, tuned
from test_hotswap import ADAPTERS, RANK, SLOTS, close, full
from torch import nn

import peft_fx
from peft_fx.errors import AdapterFileError, GraphError, HotswapError, PeftFxError

pytestmark = pytest.mark.slow


def package_of(graph, path, **options):
    return peft_fx.load_package(peft_fx.package(graph, path / "model.pt2", **options))


def adapter_tensors(gm):
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return {name: t.detach().clone() for name, t in named if ".adapters." in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# With the compiler


@pytest.fixture(scope="module", params=SLOTS)
def swapped(request, tmp_path_factory):
    """A model's name, a fresh adapter (B = 0) for it in a package, and folders of adapters to swap in."""
    name = request.param
    root = tmp_path_factory.mktemp(name)
    slots = peft_fx.prepare_hotswap(peft_fx.apply(captured(name), {"peft_type": "LORA", **SLOTS[name]}), max_rank=RANK)
    package = package_of(slots, root)
    close(output(package, name), output(captured(name), name))
    configs = ADAPTERS[name]
    folders = [folder_of(root / str(i), captured(name), full(name, c), seed=i) for i, c in enumerate(configs)]
    return name, package, folders


@pytest.mark.slow
def test_twenty_swaps_of_any_rank_and_scale_equal_eager_at_any_size(swapped):
    name, package, folders = swapped
    for i in range(20):
        folder = folders[i % len(folders)]
        report = peft_fx.hotswap(package, folder)
        assert report.tensors and report.elements
        fresh = peft_fx.load_adapter(captured(name), folder)
        for shape in ((2, 6), (1, 4), (3, 1)):
            close(output(package, name, *shape), output(fresh, name, *shape))
    assert type(package(**inputs(name))) is type(captured(name)(**inputs(name)))
    assert package.recipe["default"].r == (ADAPTERS[name] * 20)[19]["r"]


@pytest.mark.slow
def test_a_forward_beside_swaps_sees_one_adapter_or_the_other(swapped):
    name, package, folders = swapped
    expected = [output(peft_fx.load_adapter(captured(name), f), name).detach() for f in folders[:2]]
    found, done = [], threading.Event()

    def forwards():
        while not done.is_set():
            found.append(output(package, name))

    peft_fx.hotswap(package, folders[1])
    thread = threading.Thread(target=forwards)
    thread.start()
    for i in range(60):
        peft_fx.hotswap(package, folders[i % 2])
    done.set()
    thread.join()
    distances = [[(y - e).abs().max().item() for e in expected] for y in found]
    assert all(min(d) < 1e-4 < max(d) for d in distances)
    assert {d.index(min(d)) for d in distances} == {0, 1}


CLEAN = """
import sys, torch, peft_fx
package = peft_fx.load_package(sys.argv[1])
given = torch.load(sys.argv[2])
peft_fx.hotswap(package, sys.argv[3])
torch.testing.assert_close(package(**given["inputs"]).logits, given["expected"], rtol=1e-4, atol=1e-5)
assert not [m for m in sys.modules if m.startswith(("transformers.models.llama", "transformers.models.mixtral"))]
"""


@pytest.mark.slow
def test_a_new_process_runs_and_swaps_it_without_the_models_code(swapped, tmp_path):
    name, package, folders = swapped
    if name == "mixed":
        pytest.skip("its code is no importable module")
    expected = output(peft_fx.load_adapter(captured(name), folders[1]), name).detach()
    torch.save({"inputs": inputs(name), "expected": expected}, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", CLEAN, package.path, tmp_path / "given.pt", folders[1]], check=True)


METHODS_AT_ONCE = {
    "dora": {"peft_type": "LORA", "target_modules": ["conv", "head"], "r": 4, "use_dora": True},
    "oft": {"peft_type": "OFT", "target_modules": ["turned", "embed"], "oft_block_size": 4, "r": 0},
    "scale": {"peft_type": "IA3", "target_modules": ["plain"], "feedforward_modules": []},
    "hra": {"peft_type": "HRA", "target_modules": ["plain"], "r": 2},
    "over": {"peft_type": "LORA", "target_modules": ["conv", "head"], "r": 2},
    "saved": {"peft_type": "LORA", "target_modules": ["turned"], "r": 2, "modules_to_save": ["norm"]},
}


@pytest.mark.slow
def test_several_active_adapters_of_different_methods_are_swapped_one_by_one(tmp_path):
    graph = captured("mixed")
    for name, config in METHODS_AT_ONCE.items():
        graph = peft_fx.apply(graph, config, name)
    package = package_of(graph, tmp_path)
    close(output(package, "mixed"), output(graph, "mixed"))
    assert package.active == tuple(METHODS_AT_ONCE) == tuple(package.recipe)
    for i, (name, config) in enumerate(METHODS_AT_ONCE.items()):
        folder = folder_of(tmp_path / name, captured("mixed"), config, seed=i)
        before = output(package, "mixed")
        for graph_or_package in (graph, package):
            peft_fx.hotswap(graph_or_package, folder, name)
        close(output(package, "mixed"), output(graph, "mixed"))
        assert (output(package, "mixed") - before).abs().max() > 1e-3


@pytest.mark.slow
def test_gates_and_free_slots_work_in_a_package(tmp_path):
    graph = peft_fx.reserve(tuned(captured("mixed"), {"target_modules": ["plain"]}), slots=2, max_rank=RANK)
    package = package_of(graph, tmp_path)
    folder = folder_of(tmp_path / "new", captured("mixed"), {"target_modules": ["plain"], "r": 5}, seed=3)
    for each in (graph, package):
        peft_fx.hotswap(each, folder, "new")
    for names, weights in ((None, None), ("new", None), (["new", "default"], [0.5, -2.0]), ("default", None)):
        assert peft_fx.switch(package, names, weights) == peft_fx.switch(graph, names, weights)
        close(output(package, "mixed"), output(graph, "mixed"))
    for each in (graph, package):
        peft_fx.rename(each, "default", "first")
        peft_fx.release(each, "first")
    assert peft_fx.slots(package) == peft_fx.slots(graph) and list(package.recipe) == ["new"] == [*package.active]
    close(output(package, "mixed"), output(captured("mixed"), "mixed"))
    for each in (graph, package):
        peft_fx.hotswap(each, folder, "again")
        peft_fx.switch(each, "again")
    close(output(package, "mixed"), output(graph, "mixed"))


@pytest.mark.slow
def test_a_mixed_batch_works_in_a_package(tmp_path):
    graph = tuned(captured("mixed"), {"target_modules": ["plain", "head"], "r": 4})
    graph = peft_fx.mixed_batch(
        peft_fx.apply(graph, {"peft_type": "LORA", "target_modules": ["plain"], "r": 2}, "second")
    )
    package = package_of(graph, tmp_path)
    folder = folder_of(tmp_path / "new", captured("mixed"), {"target_modules": ["plain"], "r": 2}, seed=3)
    for each in (graph, package):
        peft_fx.hotswap(each, folder, "second")
    for rows in ([0, 1, -1], [1, 1, 0]):
        given = {**inputs("mixed", 3, 5), "adapter_ids": torch.tensor(rows)}
        close(package(**given), graph(**given))


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["frozen", "merged"])
def test_without_swaps_the_outputs_are_the_same(merged, tmp_path):
    graph = tuned(captured("mixed"), {"target_modules": ["plain", "conv"]})
    graph = peft_fx.merge(graph) if merged else graph
    package = package_of(graph, tmp_path, swappable=False)
    close(output(package, "mixed"), output(graph, "mixed"))
    assert package.merged == (("default",) if merged else ())


@pytest.mark.slow
def test_a_tied_bf16_model_equals_its_graph_after_a_swap(tmp_path):
    model = model_of("tied_llama").to(torch.bfloat16)
    graph = peft_fx.capture(model, kwargs=inputs("tied_llama"))
    config = {"target_modules": ["q_proj", "embed_tokens"], "r": 2}
    package, graph = package_of(tuned(graph, config), tmp_path), tuned(graph, config)
    for each in (graph, package):
        peft_fx.hotswap(each, folder_of(tmp_path / "new", captured("tied_llama"), config, seed=3))
    torch.testing.assert_close(output(package, "tied_llama"), output(graph, "tied_llama"), rtol=3e-2, atol=3e-2)


class Structured(nn.Module):
    """Nested inputs, constants, views; outputs that are constants, inputs, weights, or one tensor twice."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, flag=None, *, scale=2, more=None):
        y = self.lin(x) * scale if flag else x
        found = {"y": y, "x": x, "n": 3, "none": None, "twice": (y, y.t())}
        return found | {"w": self.lin.bias, "m": more["a"] + more["b"]}


@pytest.fixture
def structured():
    torch.manual_seed(0)
    more = {"a": torch.ones(4, 3).t(), "b": torch.ones(3, 4)}
    graph = peft_fx.capture(Structured().eval(), (torch.randn(3, 4), True), {"scale": 3, "more": more})
    return tuned(graph, {"target_modules": ["lin"], "r": 2})


@pytest.mark.slow
def test_nested_inputs_and_outputs_constants_and_views_are_kept(structured, tmp_path):
    package = package_of(structured, tmp_path)
    more = {"a": torch.randn(4, 5).t(), "b": torch.randn(5, 4).requires_grad_()}
    args, kwargs = (torch.randn(6, 4)[1:], True), {"scale": 3, "more": more}
    expected, found = structured(*args, **kwargs), package(*args, **kwargs)
    assert found["n"] == 3 and found["none"] is None and isinstance(found["twice"], tuple)
    for name in ("y", "x", "w", "m", "twice"):
        close(found[name], expected[name])
    assert not found["m"].requires_grad


# Without it: what goes into the file, what is read back, what is refused


@pytest.fixture
def no_compiler(monkeypatch):
    """Packages whose compiled code returns ones."""
    constants = []

    def compile(program, package_path, inductor_configs):
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr("model/archive_format", "pt2")
            archive.writestr("model/.data/version", "6")
            archive.writestr("model/data/aotinductor/model/model.so", "")
        constants[:] = [s.target for s in program.graph_signature.input_specs if s.target]
        constants.append(len(program.graph_signature.user_outputs))

    def load(path):
        return types.SimpleNamespace(
            get_constant_fqns=lambda: constants[:-1],
            load_constants=lambda values, check_full_update, user_managed: None,
            loader=types.SimpleNamespace(boxed_run=lambda given: [torch.ones(1)] * constants[-1]),
        )

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)


# The first that each method's table has.
CONFIGS = {
    name: {key: value for key, value in options.items() if not key.endswith("_pattern")}
    for name, options, *_ in reversed([*methods.cells("PEFT"), *methods.cells("DEFINED")])
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_swap_writes_into_a_package_what_it_writes_into_the_graph(method, no_compiler, tmp_path):
    target = "embed" if method == "TRAINABLE_TOKENS" else "plain"
    config = {**CONFIGS[method], "target_modules": [target]}
    graph = tuned(captured("mixed"), config)
    package = package_of(graph, tmp_path)
    before = adapter_tensors(package.held)
    assert same(before, adapter_tensors(graph))
    folder = folder_of(tmp_path / "new", captured("mixed"), config, seed=5)
    for each in (graph, package):
        torch.manual_seed(1)
        peft_fx.hotswap(each, folder)
    after = adapter_tensors(package.held)
    assert same(after, adapter_tensors(graph)) and not same(after, before)


MISFITS = {
    "another method": ({"peft_type": "IA3", "target_modules": ["plain"], "feedforward_modules": []}, "plain"),
    "more targets": ({"target_modules": ["plain", "head"], "r": 4}, "head"),
    "a larger rank": ({"target_modules": ["plain"], "r": 8}, "does not fit the slot"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(misfit, no_compiler, tmp_path):
    config, reason = MISFITS[misfit]
    package = package_of(tuned(captured("mixed"), {"target_modules": ["plain"], "r": 4}), tmp_path)
    before, known = adapter_tensors(package.held), package.recipe["default"]
    with pytest.raises(HotswapError, match=reason):
        peft_fx.hotswap(package, folder_of(tmp_path / "new", captured("mixed"), config))
    assert same(before, adapter_tensors(package.held)) and package.recipe["default"] == known


WRONG_CALLS = {
    "another constant": (lambda a, k: ((a[0], False), k), "compiled for flag = True, called with False"),
    "another keyword constant": (lambda a, k: (a, {**k, "scale": 2}), "compiled for scale = 3, called with 2"),
    "another dtype": (lambda a, k: ((a[0].double(), True), k), "compiled for x = float32 .* called with float64"),
    "another width": (lambda a, k: ((a[0][:, :3], True), k), r"compiled for x = .*, 4\].* called with float32 \[5, 3\]"),
    "another rank": (lambda a, k: ((a[0][0], True), k), r"called with float32 \[4\]"),
    "two sizes of one": (
        lambda a, k: (a, {**k, "more": {"a": torch.ones(5, 4), "b": torch.ones(6, 4)}}),
        r"called with float32 \[6, 4\]",
    ),
    "no tensor": (lambda a, k: ((1.0, True), k), "called with 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_call_that_compiled_code_would_misread_is_refused(case, no_compiler, structured, tmp_path):
    change, message = WRONG_CALLS[case]
    more = {"a": torch.ones(5, 4), "b": torch.ones(5, 4)}
    args, kwargs = (torch.randn(5, 4), True), {"scale": 3, "more": more}
    package = package_of(structured, tmp_path)
    package(*args, **kwargs)
    args, kwargs = change(args, kwargs)
    with pytest.raises(GraphError, match=message):
        package(*args, **kwargs)


def test_a_merged_adapter_in_a_package_is_not_swapped(no_compiler, tmp_path):
    graph = tuned(captured("mixed"), {"target_modules": ["plain"]})
    package = package_of(peft_fx.merge(graph), tmp_path)
    with pytest.raises(HotswapError, match="plain.weight: the replaced weight was not kept"):
        peft_fx.hotswap(package, peft_fx.save_adapter(graph, tmp_path / "new"))


def test_a_package_without_swaps_says_so(no_compiler, tmp_path):
    package = package_of(tuned(captured("mixed"), {"target_modules": ["plain"]}), tmp_path, swappable=False)
    with pytest.raises(HotswapError, match="packaged with swappable=False"):
        peft_fx.hotswap(package, tmp_path)
    with pytest.raises(HotswapError, match="packaged with swappable=False"):
        peft_fx.switch(package, None)
    assert "default: LORA" in repr(package)


def test_a_constant_that_the_compiler_folded_is_refused_and_nothing_is_written(no_compiler, monkeypatch, tmp_path):
    stub = types.SimpleNamespace(get_constant_fqns=lambda: [])
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: stub)
    with pytest.raises(GraphError, match="peft_fx.adapters.default.plain.*swappable=False"):
        peft_fx.package(tuned(captured("mixed"), {"target_modules": ["plain"]}), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_other_verbs_refuse_a_package_and_copies_of_it(no_compiler, tmp_path):
    package = package_of(tuned(captured("mixed"), {"target_modules": ["plain"]}), tmp_path)
    for verb in (peft_fx.merge, peft_fx.export, lambda p: peft_fx.set_adapter(p, "default")):
        with pytest.raises(GraphError, match="got Package"):
            verb(package)
    with pytest.raises(GraphError, match="load it again"):
        copy.deepcopy(package)


def test_what_cannot_be_packaged_is_refused(no_compiler, tmp_path):
    graph = tuned(captured("mixed"), {"target_modules": ["plain"]})
    with pytest.raises(AdapterFileError, match="ends in .pt2"):
        peft_fx.package(graph, tmp_path / "model.so")
    with pytest.raises(AdapterFileError, match="existing folder"):
        peft_fx.package(graph, tmp_path / "nowhere" / "model.pt2")
    with pytest.raises(GraphError, match="call eval"):
        peft_fx.package(copy.deepcopy(graph).train(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def edited(path, change):
    """The archive with each entry replaced by change(name, content), or left out for None."""
    new = path.with_name("edited.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as out:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                out.writestr(name, content)
    return new


def with_json(**entries):
    return lambda n, c: json.dumps(json.loads(c) | entries) if n.endswith("peft_fx.json") else c


DAMAGES = {
    "another origin": (lambda n, c: None if "peft_fx" in n else c, "peft_fx.package did not write it"),
    "no compiled code": (lambda n, c: None if "aotinductor" in n else c, "holds no compiled code"),
    "no tensors": (lambda n, c: None if n.endswith(".safetensors") else c, "peft_fx.package did not write it"),
    "noise for tensors": (lambda n, c: b"noise" if n.endswith(".safetensors") else c, "damaged"),
    "json cut off": (lambda n, c: c[:30] if n.endswith("peft_fx.json") else c, "damaged"),
    "another format": (with_json(format=99), "format 99"),
    "a method that does not exist": (with_json(recipe={"default": {"peft_type": "NOPE"}}), "NOPE"),
    "other shapes": (with_json(constants={"peft_fx.adapters.default.plain.on_weight.lora_A": [[9, 9], "float32"]}), "expected"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_gives_one_clear_error(damage, no_compiler, tmp_path):
    path = peft_fx.package(tuned(captured("mixed"), {"target_modules": ["plain"]}), tmp_path / "model.pt2")
    change, message = DAMAGES[damage]
    with pytest.raises(AdapterFileError, match=f"edited.pt2: .*{message}"):
        peft_fx.load_package(edited(path, change))


def test_files_of_export_and_of_package_are_told_apart(no_compiler, tmp_path):
    graph = tuned(captured("mixed"), {"target_modules": ["plain"]})
    peft_fx.export(graph, tmp_path / "exported.pt2")
    with pytest.raises(AdapterFileError, match="peft_fx.load reads exported programs"):
        peft_fx.load_package(tmp_path / "exported.pt2")
    peft_fx.package(graph, tmp_path / "packaged.pt2")
    with pytest.raises(AdapterFileError, match="peft_fx.load_package runs it"):
        peft_fx.load(tmp_path / "packaged.pt2")
    with pytest.raises(PeftFxError, match="no such file"):
        peft_fx.load_package(tmp_path / "nowhere.pt2")
