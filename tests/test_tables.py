"""Tables: no number is cut at any width, nothing is wider than asked for, and what notebooks get is escaped."""

import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import peft_fx
from peft_fx.cli import app, as_json, as_table, gathering
from peft_fx.tables import Cell, Table, as_html, text, wrapped
from peft_fx.target import sizes

WIDTHS = (40, 60, 79, 80, 100, 200)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "input_layernorm", "q_prj"]}


def numbers(shown: str) -> set[str]:
    return set(NUMBER.findall(shown))


# Any table ---------------------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z_]{1,12}(\.([a-z_]{1,12}|\{0\.\.[1-9][0-9]?\}|[0-9]{1,3})){0,6}", fullmatch=True)
words = st.lists(names | st.integers(0, 10**12).map("{:,}".format), max_size=12).map(" ".join)
counts = st.integers(-(10**12), 10**12).map("{:,}".format)


@st.composite
def tables(draw):
    kinds = draw(st.lists(st.sampled_from([names, words, counts]), min_size=1, max_size=9))
    heads = tuple(f"column{i}" for i in range(len(kinds)))
    rows = draw(st.lists(st.tuples(*kinds), min_size=1, max_size=4))
    return Table(heads, rows, frozenset(h for h, k in zip(heads, kinds, strict=True) if k is counts))


@settings(max_examples=40)
@given(tables(), st.integers(40, 200))
def test_every_number_of_a_table_is_whole_and_its_lines_fit(table, width):
    shown = text([table], width)
    expected = {n for row in table.rows for cell in row for n in NUMBER.findall(cell)}
    assert expected <= numbers(shown)
    assert max(map(len, shown.splitlines())) <= width


@given(words, st.integers(18, 60))
def test_wrapped_text_loses_nothing_but_spaces(words, width):
    lines = wrapped(words, width)
    assert "".join(lines).replace(" ", "") == words.replace(" ", "")
    assert all(len(line) <= width or re.fullmatch(r"[\d.,]+", line) for line in lines)


def test_columns_that_do_not_fit_come_below_with_the_first_column_again():
    table = Table(("name", *(f"number{i}" for i in range(6))), [("first", *["123,456,789"] * 6)])
    heads = [line.split() for line in text([table], 40).splitlines() if line.startswith("name")]
    assert [h[0] for h in heads] == ["name"] * len(heads)
    assert sum("number5" in h for h in heads) == 1
    assert len(text([table], 200).splitlines()) == 3


def test_control_characters_of_names_do_not_reach_the_terminal():
    shown = text([Table(("name",), [("a\x1b[31mb\x07",)])], 80)
    assert "\x1b" not in shown and "\x07" not in shown and r"a\x1b[31mb\x07" in shown


def test_a_shape_is_written_as_torch_writes_it():
    assert str((64, 32)) != sizes((64, 32)) == "[64, 32]"
    assert [sizes(()), sizes((3,)), sizes(("s0", 4))] == ["[]", "[3]", "[s0, 4]"]


# HTML --------------------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


HOSTILE = "<script>alert('x')</script>&\"<img src=http://a.b/c onerror=1>"


@pytest.mark.parametrize(
    "parts", [[HOSTILE], [Table((HOSTILE, "n"), [(HOSTILE, "1"), (Cell(HOSTILE, "red"), "2")], frozenset("n"))]]
)
def test_html_escapes_everything_and_loads_nothing(parts):
    page = Elements(as_html(parts))
    assert {tag for tag, _ in page.tags} <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert all(attrs.keys() <= {"style"} for _, attrs in page.tags)
    assert HOSTILE in page.words


# The commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inspections():
    """What `inspect` found, to be drawn at any width."""
    base = peft_fx.capture(tiny.build("llama").eval())
    tuned = peft_fx.apply(base, LORA | {"target_modules": ["q_proj"], "init_lora_weights": False})
    graphs, recipe = {"base": base, "merged": peft_fx.merge(tuned)}, json.dumps(LORA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gathering, "open_model", lambda source: SimpleNamespace(graph=lambda: graphs[source], weights=True)
        )
        return {
            "possible": gathering.gather("base", None, None, None),
            "recipe": gathering.gather("base", recipe, None, None),
            "target": gathering.gather("base", recipe, None, "q_proj"),
            "merged": gathering.gather("merged", None, None, None),
        }


def inspected(inspection, width, expand=False) -> str:
    console = Console(width=width, file=io.StringIO())
    as_table.show(inspection, console, expand)
    return console.file.getvalue()


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("name", ["possible", "recipe", "target", "merged"])
def test_inspect_shows_the_same_numbers_at_every_width(inspections, name, expand):
    wide = numbers(inspected(inspections[name], 400, expand))
    for width in range(40, 201):
        assert numbers(inspected(inspections[name], width, expand)) == wide, f"{width} columns"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_numbers_of_the_json_output_are_in_the_table(inspections, width):
    found = as_json.document(inspections["recipe"])
    table = numbers(inspected(inspections["recipe"], width, expand=True))
    planned = [t for t in found["targets"] if t["status"] == "planned"]
    whole = {found["model"]["parameters"], *found["totals"].values(), *(t["parameters"] for t in planned)} - {0}
    assert planned and {f"{n:,}" for n in whole} <= table
    assert {str(n) for t in planned for n in t["shape"]} <= table


@pytest.mark.parametrize("arguments", [[], ["boft"]], ids=["all", "one"])
def test_methods_shows_the_same_numbers_at_every_width(arguments):
    def shown(width):
        result = CliRunner(env={"COLUMNS": str(width)}).invoke(app, ["methods", *arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    wide = numbers(shown(400))
    assert all(numbers(shown(width)) == wide for width in WIDTHS)


def test_methods_fits_80_columns():
    lines = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["methods"]).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("LORA ") for line in lines) == 1  # in one table
