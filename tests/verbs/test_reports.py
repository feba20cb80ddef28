"""What verbs return prints well: a line or a table in the terminal's width, and the same, escaped, in a notebook."""

import html
import io
import sys
from html.parser import HTMLParser

import pytest
from graphs import captured, tuned

import peft_fx
from peft_fx import LoraConfig, Recipe
from peft_fx.folding import folded_names
from peft_fx.tables import Table, terminal_width, text

PLAIN = {"target_modules": ["turned", "plain", "head"], "r": 4}
HOSTILE = "<b onclick='x()'>&name"


def lora(config=PLAIN):
    return tuned(captured("mixed"), config, 1)


def saved(folder, **fields):
    peft_fx.save_adapter(lora(PLAIN | fields), folder / HOSTILE)
    return folder / HOSTILE


def swapped(folder):
    return peft_fx.hotswap(lora(), saved(folder, r=2, target_modules=["turned", "plain"]))


# what is shown -> (how it is made, in a folder; what its text says)
SHOWN = {
    "graph": (lambda t: lora(), "LORA r=4, 3 targets"),
    "graph with a hostile name": (lambda t: peft_fx.apply(lora(), LoraConfig(target_modules=["plain"]), HOSTILE), HOSTILE),
    "explanation": (lambda t: peft_fx.explain(lora()), "3 targets · +"),
    "explanation of a recipe": (
        lambda t: peft_fx.explain(captured("mixed"), {"peft_type": "LORA", "target_modules": ["plain", HOSTILE]}), "1 unmatched",
    ),
    "explanation without adapters": (lambda t: peft_fx.explain(captured("mixed")), "explain(graph, recipe) shows what"),
    "parameters": (lambda t: peft_fx.trainable_parameters(lora()), "trainable%: "),
    "swap report": (swapped, "tensors padded; 1 target left out: head"),
    "swap in memory": (lambda t: peft_fx.prepare_swap(lora(), saved(t)), "ready to be swapped in by hotswap(graph, swap)"),
    "config": (lambda t: LoraConfig(r=3, target_modules=[HOSTILE]), "r=3"),
    "recipe": (lambda t: Recipe({HOSTILE: LoraConfig(r=3)}), "r=3"),
}  # fmt: skip


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.words = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags |= {tag, *(name for name, _ in attrs)}

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_returned_has_a_text_and_the_same_for_a_notebook(name, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    make, says = SHOWN[name]
    found = make(tmp_path)
    assert says in str(found)
    page = Elements(found._repr_html_())
    assert page.tags <= {"p", "table", "thead", "tbody", "tr", "th", "td", "style"}
    assert HOSTILE not in found._repr_html_()
    assert (
        (HOSTILE in str(found))
        == any(HOSTILE in w for w in page.words)
        == (html.escape(HOSTILE) in found._repr_html_())
    )


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", ["graph", "explanation", "explanation of a recipe", "swap report"])
def test_its_lines_fit_the_terminal(name, columns, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    found = SHOWN[name][0](tmp_path)
    assert max(map(len, str(found).splitlines())) <= columns
    assert repr(found) == str(found)


def test_in_a_file_it_is_80_columns_wide(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    assert terminal_width() == 80 == max(map(len, text([Table(("head",), [("word " * 40,)])]).splitlines()))


def test_a_config_names_first_what_differs_from_its_defaults():
    page = Elements(LoraConfig(lora_dropout=0.25, r=3)._repr_html_())
    first = page.words.index("default") + 1
    cells = [w for w in page.words[first:] if w.strip()]
    assert {tuple(cells[0:3]), tuple(cells[3:6])} == {("r", "3", "8"), ("lora_dropout", "0.25", "0.0")}
    assert cells[6:9] == ["task_type", "None", "None"]


def test_explain_folds_equal_layers_as_inspect_does(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    graph = tuned(captured("llama"), {"target_modules": ["q_proj", "down_proj"], "r": 2}, 1)
    lines = str(peft_fx.explain(graph)).splitlines()
    names = [r.target for r in peft_fx.explain(graph).rows]
    layers = len(names) // 2
    assert {n.removesuffix(".weight") for n in folded_names(names)} == {
        f"model.layers.{{0..{layers - 1}}}.{n}" for n in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert [line.split()[1] for line in lines if line.startswith("model.")] == [str(layers)] * 2


def test_a_refusal_of_many_equal_layers_is_one_line():
    with pytest.raises(peft_fx.RecipeError) as caught:
        peft_fx.apply(captured("llama"), {"peft_type": "LORA", "target_modules": ["input_layernorm", "q_proj"]})
    _, line = str(caught.value).splitlines()
    assert (
        line.startswith("  model.layers.{0..") and "}.input_layernorm.weight: LoRA has no form on a 1-d weight" in line
    )
