"""What a newcomer types wrongly: each verb says in one line what came, what was expected and what to do, and changes nothing."""

import pytest
import torch
from graphs import captured, model_of, output, tuned

import peft_fx as fx

LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["plain"]}
LINEAR = torch.nn.Linear(2, 2)

VERBS = {
    "apply": lambda g: fx.apply(g, LORA), "explain": fx.explain, "merge": fx.merge, "unmerge": fx.unmerge,
    "hotswap": lambda g: fx.hotswap(g, "folder"), "prepare_swap": lambda g: fx.prepare_swap(g, "folder"),
    "prepare_hotswap": lambda g: fx.prepare_hotswap(g, max_rank=8), "reserve": lambda g: fx.reserve(g, slots=2),
    "switch": lambda g: fx.switch(g, "default"), "set_adapter": lambda g: fx.set_adapter(g, "default"),
    "delete_adapter": lambda g: fx.delete_adapter(g, "default"), "save_adapter": lambda g: fx.save_adapter(g, "folder"),
    "disable_adapter": lambda g: fx.disable_adapter(g).__enter__(), "load_adapter": lambda g: fx.load_adapter(g, "folder"),
    "export": lambda g: fx.export(g, "a.pt2"), "package": lambda g: fx.package(g, "a.pt2"), "compile": fx.compile,
    "outline": fx.outline, "inline": fx.inline, "mixed_batch": fx.mixed_batch,
    "combine": lambda g: fx.combine(g, ["default"], [1.0], "new"),
}  # fmt: skip

GIVEN = {
    "a model": (lambda: LINEAR, "got Linear: peft_fx.capture(model) makes one"),
    "a class": (lambda: torch.nn.Linear, "got the class Linear: make an instance"),
    "a path": (lambda: "model.pt2", "got str: peft_fx.load(path) reads one"),
    "nothing": (lambda: None, "got NoneType"),
    "a PeftModel": (lambda: fx.get_peft_model(model_of("mixed"), fx.LoraConfig(target_modules=["plain"])), "its to_graph() makes one"),
}  # fmt: skip


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_names_itself_what_came_and_how_a_graph_is_made(verb, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, says = GIVEN[given]
    with pytest.raises(fx.GraphError) as caught:
        VERBS[verb](make())
    assert str(caught.value).startswith(f"{verb} needs a graph made by peft_fx.capture or peft_fx.load, ")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# (graph with an adapter) -> what is wrong; what the error says
WRONG = {
    "a method's name as recipe": (lambda t: fx.apply(t, "lora"), "a folder with adapter_config.json, or a config, e.g. {'peft_type': 'LORA'}"),
    "a class as recipe": (lambda t: fx.apply(t, fx.LoraConfig), "got the class LoraConfig: call it"),
    "a list as recipe": (lambda t: fx.apply(t, ["plain"]), "expected a config, a recipe, a dict or a path, got list"),
    "a name that is taken": (lambda t: fx.apply(t, LORA), "there is an adapter 'default' already"),
    "a number as name": (lambda t: fx.apply(t, LORA, 3), "adapter name 3: expected a string, got int"),
    "a form that there is not": (lambda t: fx.apply(t, LORA, "b", lowering="wieght"), "expected one of ('auto', 'activation', 'weight')"),
    "a misspelt adapter": (lambda t: fx.set_adapter(t, "defualt"), "there is no adapter 'defualt'; resident: default"),
    "no adapter": (lambda t: fx.set_adapter(t, None), "expected an adapter's name or a list of names, got None; resident: default"),
    "a number to merge": (lambda t: fx.merge(t, adapter_names=3), "expected an adapter's name or a list of names, got 3"),
    "a number to switch": (lambda t: fx.switch(fx.reserve(t, slots=2), 3), "expected an adapter's name or a list of names, got 3"),
    "one weight": (lambda t: fx.switch(fx.reserve(t, slots=2), "default", weights=0.5), "weights=0.5: expected 1 numbers in a list"),
    "too many weights": (lambda t: fx.combine(t, ["default"], [1.0, 2.0], "new"), "1 adapters and 2 weights: give one weight for each"),
    "a switch without slots": (lambda t: fx.switch(t, "default"), "make one with peft_fx.reserve(tuned, slots=...)"),
    "a compiled graph": (lambda t: fx.merge(torch.compile(t)), "got OptimizedModule: give the graph that was compiled, ._orig_mod"),
    "an unmerge without merge": (fx.unmerge, "nothing to unmerge: no adapter is merged"),
    "two merges": (lambda t: fx.merge(fx.merge(t)), "merged already; unmerge first"),
    "no folder to swap": (lambda t: fx.hotswap(t, None), "expected an adapter folder, a .safetensors file or a hub id, got NoneType"),
    "a config to swap": (lambda t: fx.hotswap(t, fx.LoraConfig()), "a hub id, got LoraConfig"),
    "a folder that is not there": (lambda t: fx.load_adapter(t, "my-adaptr", "b"), "my-adaptr: no such folder"),
    "no folder to save to": (lambda t: fx.save_adapter(t, None), "expected a folder to write the adapter to, got NoneType"),
    "no file to load": (lambda t: fx.load(None), "expected a .pt2 file, got NoneType"),
    "no package to load": (lambda t: fx.load_package(3), "expected a .pt2 file, got int"),
    "a number to export to": (lambda t: fx.export(t, 3), "expected a .pt2 file to write, got int"),
    "no file to package to": (lambda t: fx.package(t, None), "expected a .pt2 file to write, got NoneType"),
    "a graph to capture": (fx.capture, "this is a captured graph already"),
    "a graph for get_peft_model": (lambda t: fx.get_peft_model(t, fx.LoraConfig(target_modules=["plain"])), "peft_fx.apply(graph, recipe)"),
    "a model behind its folder": (lambda t: fx.PeftModel.from_pretrained("folder", LINEAR), "expected a folder or a hub id, got Linear"),
    "no example": (lambda t: fx.capture(LINEAR), "Linear needs example inputs: capture(model, args=(x,))"),
    "a tensor as example": (lambda t: fx.capture(LINEAR, torch.ones(2, 2)), "got Tensor: one input is args=(x,)"),
    "names as example": (lambda t: fx.capture(LINEAR, {"input": torch.ones(2, 2)}), "got dict: by name they are kwargs={...}"),
    "another name as example": (
        lambda t: fx.capture(LINEAR, kwargs={"x": torch.ones(2, 2)}), "Linear.forward(input) cannot be called with these: missing",
    ),
    "a folder's parameters": (lambda t: fx.trainable_parameters("folder"), "those of a graph or a model, got str"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_and_the_graph_stays_as_it_was(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mistake, says = WRONG[name]
    graph = tuned(captured("mixed"), {"target_modules": ["plain"], "r": 4}, 1)
    before = output(graph, "mixed")
    with pytest.raises(fx.PeftFxError) as caught:
        mistake(graph)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(output(graph, "mixed"), before) and not list(tmp_path.iterdir())
