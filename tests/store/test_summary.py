"""A printed graph is a summary of what it is: cheap, in a parent's text too, and the whole code stays in `code`."""

import copy
import re

import pytest
import torch
from graphs import captured, inputs, model_of, tuned
from torch import fx, nn

import peft_fx

PLAIN = {"target_modules": ["turned", "plain", "head"], "r": 4}


def lora():
    return tuned(captured("mixed"), PLAIN, 1, lowering="activation")


def two():
    return peft_fx.apply(lora(), {"adapters": {"second": {"peft_type": "SHIRA", "r": 2, "target_modules": ["plain"]}}})


def words(graph) -> str:
    return " ".join(str(graph).split())


GRAPHS = {
    "captured": (lambda: captured("mixed"), "mode eval", ("adapter",)),
    "adapted": (lora, "adapter default LORA r=4, 3 targets, activation form, active", ()),
    "inactive": (lambda: peft_fx.set_adapter(two(), "default"), "adapter second SHIRA r=2, 1 target, not active", ()),
    "merged": (lambda: peft_fx.merge(lora()), "LORA r=4, 3 targets, merged into the weights", ("active", "form")),
    "slots": (lambda: peft_fx.reserve(lora(), slots=3), "on with weight 1 free slots 2", ("not active", "slot0")),
    "mixed batch": (lambda: peft_fx.mixed_batch(lora()), "input adapter_ids int64 [", ()),
    "copy": (lambda: copy.deepcopy(lora()), "adapter default LORA r=4", ()),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_says_what_it_is(name):
    make, says, says_not = GRAPHS[name]
    graph = make()
    shown = words(graph)
    count = peft_fx.trainable_parameters(graph)
    assert says in shown and not [w for w in says_not if w in shown]
    assert shown.startswith(f"GraphModule of {type(model_of('mixed')).__name__} ")
    assert f"{count.total:,}, of which {count.trainable:,} are trained" in shown
    assert "float32 on cpu" in shown and "peft_fx.explain(graph)" in shown and "graph.code" in shown
    assert repr(graph) == str(graph)


def test_the_forms_that_it_names_are_those_of_explain():
    graph = peft_fx.apply(captured("mixed"), {"adapters": {"default": {"peft_type": "SHIRA", **PLAIN, "r": 1}}})
    forms = [r.lowering for r in peft_fx.explain(graph).rows]
    expected = [f"{form} form" + f" on {forms.count(form)}" * (len(set(forms)) > 1) for form in dict.fromkeys(forms)]
    assert all(text in words(graph) for text in expected)


def test_printing_makes_no_code_and_no_copy_of_the_graph():
    graph = lora()
    str(graph)
    assert "forward" not in vars(type(graph)) and graph.__dict__["_graph"] is None
    assert "def forward" in graph.code


def test_inputs_are_listed_with_sizes_that_may_vary_by_name():
    shown = words(lora())
    (name, sizes), = re.findall(r"input (ids) int64 \[([^]]*)\]", shown)  # fmt: skip
    dynamic = [s.strip() for s in sizes.split(",")]
    assert len(dynamic) == inputs("mixed")[name].dim()
    assert all(re.search(rf"{s} from \d", shown) for s in dynamic if not s.isdigit())


def test_a_graph_with_one_mode_says_why():
    class Modal(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(4, 4)

        def forward(self, x):
            return torch.relu(self.plain(x)).sum(0) if self.training else self.plain(x)

    graph = peft_fx.capture(Modal().eval(), (torch.ones(3, 4),))
    assert "mode eval only: " in words(graph)


def test_a_parent_prints_its_graph_as_one_of_its_parts():
    lines = str(nn.ModuleDict({"first": nn.Linear(2, 2), "graph": lora()})).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  (graph): GraphModule of "))
    assert lines[at - 1].startswith("  (first): Linear(") and lines[-1] == ")"
    assert all(line.startswith("    ") for line in lines[at + 1 : -1])


def test_a_graph_that_lost_its_state_prints_as_any_module():
    graph = lora()
    graph.meta.clear()
    assert str(graph).startswith("GraphModule(") and graph._repr_html_() is None


def test_torch_fx_s_own_modules_print_as_before():
    assert "def forward" in str(fx.symbolic_trace(nn.Linear(2, 2)))
