"""`peft-fx methods` and docs/methods.md say what the code does."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import peft_fx
from peft_fx.cli import app
from peft_fx.cli.method_facts import KINDS, facts, names
from peft_fx.methods import INTERNAL, METHODS
from peft_fx.planning.plan import ROOT_KEY

TOOLS = Path(peft_fx.__file__).resolve().parent.parent / "tools"


def shown(*arguments) -> str:
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, ["methods", *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_every_public_method_has_a_line():
    lines = [line.split() for line in shown().splitlines()]
    assert METHODS.keys() - INTERNAL <= {words[0] for words in lines if words}


@pytest.mark.parametrize("name", names())
def test_a_method_shows_its_formula_its_options_and_its_keys(name):
    f, text = facts(name), " ".join(shown(name.lower()).split())
    assert " ".join(f.text.split()) in text
    assert all(f"{field} =" in text for field in f.fields)
    assert all(spec.key.removeprefix(ROOT_KEY) in text for spec in f.tensors.values() if spec.key)
    assert any(f.kinds.values()), f"{name} takes no operator kind"
    assert {kind for kind, form in f.kinds.items() if not form} == f.refused.keys() <= KINDS.keys()


def test_what_is_known_of_lora_ia3_and_vera():
    lora, ia3, vera, dora = (facts(name) for name in ("LORA", "IA3", "VERA", "DORA"))
    assert lora.kinds == {kind: "" if kind == "norm" else "activation" for kind in KINDS}
    assert (
        (dora.kinds["linear"], dora.kinds["conv2d"]) == ("activation", "weight") and lora.neutral and not dora.neutral
    )
    assert (lora.parameters, ia3.parameters, dora.parameters) == (2 * 8 * 256, 256, 2 * 8 * 256 + 256)
    assert vera.shared and not lora.shared and lora.ranks and not ia3.ranks
    assert lora.identity and ia3.identity and vera.identity and dora.identity
    assert (lora.papers, vera.shape) == (["2106.09685", "2312.03732"], "Additive")


def test_an_unknown_method_is_one_line_that_names_the_known_ones():
    result = CliRunner().invoke(app, ["methods", "saved"])
    assert result.exit_code == 2
    assert result.stderr.startswith("peft-fx: error: peft_type 'saved' is unknown; if it is ")
    assert "this version has: ADALORA, " in result.stderr


def test_the_page_on_methods_is_what_the_code_gives(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import methods_md

    assert methods_md.FILE.read_text(encoding="utf-8") == methods_md.markdown(), "run python tools/methods_md.py"
    sys.modules.pop("methods_md")
