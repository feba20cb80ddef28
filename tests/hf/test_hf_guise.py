"""A forward that somebody sets on a `PeftModel` which they take for one of transformers' own."""

import functools
import sys
from types import MethodType

import pytest
import torch
from graphs import inputs, model_of
from torch.nn import functional as F

import peft_fx

LORA = dict(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)


@pytest.fixture
def no_peft(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft")


def model(**config):
    config = {"peft_type": "LORA", **LORA, **config}
    return peft_fx.get_peft_model(model_of("biased_llama"), config).eval()


def hidden(self, *args, **kwargs):
    """As a tool that wants a language model's hidden states writes it."""
    return self.base_model(*args, **kwargs).last_hidden_state


def test_it_gets_the_model_itself_whose_body_gives_hidden_states(no_peft):
    tuned = model()
    wanted = tuned(**inputs("biased_llama"), output_hidden_states=True).hidden_states[-1]
    tuned.forward = MethodType(hidden, tuned)
    assert torch.equal(tuned(**inputs("biased_llama")), wanted)
    assert not torch.equal(wanted, model_of("biased_llama").model(**inputs("biased_llama")).last_hidden_state)


def test_it_can_call_the_one_that_was_there(no_peft):
    tuned = model()
    before, there = tuned(**inputs("biased_llama")).logits, tuned.forward
    tuned.forward = MethodType(functools.wraps(type(tuned).forward)(lambda self, **kwargs: there(**kwargs)), tuned)
    assert torch.equal(tuned(**inputs("biased_llama")).logits, before)


def test_one_that_wraps_the_one_that_was_there_wraps_it(no_peft):
    tuned = model()
    before, seen = tuned(**inputs("biased_llama")).logits, []

    @functools.wraps(tuned.forward.__func__)
    def wrapper(self, *args, _there=tuned.forward.__func__, **kwargs):
        seen.append(self)
        return _there(self, *args, **kwargs)

    tuned.forward = MethodType(wrapper, tuned)
    assert torch.equal(tuned(**inputs("biased_llama")).logits, before) and seen[0] is tuned


def test_its_loss_has_what_the_method_adds(no_peft):
    tuned = model(peft_type="ADALORA", init_r=4, total_step=9, r=8).train()
    batch = {**inputs("biased_llama"), "labels": inputs("biased_llama")["input_ids"]}

    def forward(self, labels, **kwargs):
        out = self.model(**kwargs)
        logits = self.lm_head(out.last_hidden_state)
        out.loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return out

    wanted = tuned(**batch).loss
    tuned.forward = MethodType(forward, tuned)
    torch.testing.assert_close(tuned(**batch).loss, wanted)


def test_where_peft_is_imported_it_gets_the_peft_model():
    tuned = model()
    tuned.forward = MethodType(lambda self, **kwargs: self, tuned)
    assert tuned() is tuned
