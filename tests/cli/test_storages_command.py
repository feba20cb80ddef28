"""`peft-fx methods --storage` and docs/storages.md show the cells that were run."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import peft_fx
from peft_fx.cli import app
from peft_fx.cli.storages import FILE, read
from peft_fx.storage.schemes import SCHEMES

TOOLS = Path(peft_fx.__file__).resolve().parent.parent / "tools"


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, ["methods", *arguments])


def lines_of(*arguments):
    result = invoke("--storage", *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


def test_a_row_for_each_method_and_a_column_for_each_storage_with_peft_s_mark():
    known, lines = read(), lines_of()
    head, rows = lines[1].split(), {words[0]: words[1:] for line in lines if (words := line.split())}
    assert head == ["method", *SCHEMES]
    for method in known.methods:
        for i, scheme in enumerate(SCHEMES):
            ours, pefts = rows[method][2 * i : 2 * i + 2]
            assert (ours == "x") == (not known.refusals(scheme, method)) and pefts == known.pefts(scheme, method)
    reasons = {r for scheme in SCHEMES for m in known.methods for r in known.refusals(scheme, m).values()}
    assert reasons and all(any(reason in line for line in lines) for reason in reasons)


def test_step_by_step():
    known, lines = read(), lines_of("--method", "lora", "--scheme", "aqlm")
    cells = lines[3].split()
    assert cells[:2] == ["LORA", "aqlm"] and cells[-1] == "f"
    assert [c == "x" for c in cells[2:-1]] == [not known.refusal("aqlm", step, "LORA") for step in known.steps]
    assert lines_of("LORA", "--scheme", "aqlm") == lines
    assert [line.split()[1] for line in lines_of("--method", "oft")[3 : 3 + len(SCHEMES)]] == list(SCHEMES)


@pytest.mark.parametrize("arguments, message", [
    (("--storage", "--method", "lorra"), "is unknown"),
    (("--storage", "--scheme", "gpt"), "'gpt' is no storage: this version has bnb4, "),
    (("--scheme", "gptq"), "--method and --scheme go with --storage"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_page_on_storages_is_made_of_the_cells(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import storage_table

    held = json.loads(FILE.read_text(encoding="utf-8"))
    assert storage_table.PAGE.read_text(encoding="utf-8") == storage_table.markdown(held), (
        "run tools/storage_table.py --page"
    )
    sys.modules.pop("storage_table")
