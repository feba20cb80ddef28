"""Every method on every storage does what `peft-fx methods --storage` says: it passes, or is refused with the reason given there."""

import pytest
from storage_cells import STEPS, outcomes

from peft_fx.cli.method_facts import names
from peft_fx.cli.storages import WHAT, read
from peft_fx.storage.schemes import SCHEMES

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EVERYWHERE = (
    "LORA",
    "OFT",
    "IA3",
)  # on all storages; the other methods on one: `tools/storage_table.py` runs all on all
CASES = [
    *(pytest.param(m, tuple(SCHEMES), marks=pytest.mark.slow, id=m) for m in EVERYWHERE),
    *(pytest.param(m, ("bnb4",), id=f"{m}-bnb4") for m in names() if m not in EVERYWHERE),
]


@pytest.mark.parametrize("method, schemes", CASES)
def test_cells_are_as_the_table_says(method, schemes):
    known = read()
    expected = {step: {s: known.refusal(s, step, method) for s in schemes} for step in STEPS}
    assert outcomes(method, schemes) == expected


def test_the_table_has_every_method_storage_and_step():
    known = read()
    assert [*known.methods] == names()
    assert list(known.cells) == list(SCHEMES)
    assert all([*steps] == [*known.steps] == [*STEPS] == [*WHAT] for steps in known.cells.values())


def test_refusals_have_reasons_and_are_no_failures():
    for steps in read().cells.values():
        for cell in steps.values():
            if cell != "all":
                refused = [m for methods in cell["refused"].values() for m in methods]
                assert sorted([*cell["passes"], *refused]) == names()
                assert all(len(reason) > 20 and not reason.startswith("FAILED") for reason in cell["refused"])


def test_peft_s_pairs_are_of_methods_and_storages_that_there_are():
    known = read()
    assert known.peft.keys() <= set(known.methods)
    for pairs in known.peft.values():
        named = [s for schemes in pairs.values() for s in schemes]
        assert len(named) == len(set(named)) and set(named) <= SCHEMES.keys()
