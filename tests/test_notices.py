"""Warnings point at the line of the user's that led to them, however deep in the package they arise."""

import warnings

import conformance as c
import pytest
from graphs import inputs, model_of
from marks import quick
from torch import nn

import peft_fx

UNMATCHED = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "nothing_of_the_kind"]}


def tuned():
    return peft_fx.get_peft_model(model_of("tied_llama"), peft_fx.LoraConfig(target_modules=["q_proj"]))


def called_twice(model):
    return [model(**inputs("tied_llama")) for _ in range(2)]


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, input_ids, **others):
        return self.first(input_ids.float()[..., :2])


PARTLY = {"peft_type": "LORA", "target_modules": ["first", "last"]}
CASES = {
    "a verb": lambda: peft_fx.apply(c.captured("tied_llama"), UNMATCHED),
    "get_peft_model": lambda: peft_fx.get_peft_model(model_of("tied_llama"), UNMATCHED),
    "a tuner's class": lambda: peft_fx.LoraModel(model_of("tied_llama"), UNMATCHED, "default"),
    "a model inside of another": lambda: peft_fx.get_peft_model(tuned().get_base_model(), UNMATCHED | {"target_modules": "all-linear"}),
    "a method": lambda: tuned().unmerge_adapter(),
    "a method through another": lambda: tuned().base_model.unmerge_adapter(),
    "a call": lambda: called_twice(peft_fx.get_peft_model(Partly(), PARTLY)),
}  # fmt: skip


@pytest.mark.parametrize("case", quick(CASES, "a verb", "get_peft_model"))
def test_a_warning_is_at_the_users_line(case):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        CASES[case]()
    assert found and {w.filename for w in found} == {__file__}
