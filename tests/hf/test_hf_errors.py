"""Misuse is refused as PEFT refuses it, with a text of our own, and nothing changes. The rows are in tests/misuse/."""

import peft
import pytest
import torch
from misuse import bare, configs, edited, files, lora, models, refused, stricter, stumbled

import peft_fx

SUBJECTS = {"configs": configs, "files": files, "models": models}


def every(table):
    """Rows of one table over all subjects, by subject and id."""
    return {
        f"{name}: {row}": found for name, module in SUBJECTS.items() for row, found in getattr(module, table).items()
    }


REFUSED, STUMBLES, STRICTER = map(every, ("REFUSED", "STUMBLES", "STRICTER"))


@pytest.mark.parametrize("row", REFUSED)
def test_what_peft_refuses_is_refused_as_the_same_class(row, tmp_path):
    assert REFUSED[row][2] in refused(REFUSED[row], tmp_path)


@pytest.mark.parametrize("row", STUMBLES)
def test_what_peft_stumbles_over_is_refused(row, tmp_path):
    assert STUMBLES[row][2] in stumbled(STUMBLES[row], tmp_path)


@pytest.mark.parametrize("row", STRICTER)
def test_what_peft_lets_pass_is_refused(row, tmp_path):
    assert STRICTER[row][2] in stricter(STRICTER[row], tmp_path)


def test_a_refused_config_leaves_the_model_trainable():
    base = bare()
    for fields in ({"target_modules": ["qq"]}, {"target_modules": ["act"]}):
        with pytest.raises(ValueError):
            peft_fx.get_peft_model(base, lora(peft_fx, **fields))
        with pytest.raises(ValueError):
            peft_fx.inject_adapter_in_model(lora(peft_fx, **fields), base)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.filterwarnings("ignore")
def test_of_other_shapes_what_fits_is_loaded(tmp_path):
    folder = edited(tmp_path, rank_pattern={"q": 2})
    loaded = []
    for lib in (peft, peft_fx):
        model = lib.PeftModel.from_pretrained(bare(), folder, ignore_mismatched_sizes=True)
        model.load_adapter(folder, "new", ignore_mismatched_sizes=True)
        model.set_adapter("new")
        loaded.append(lib.get_peft_model_state_dict(model, adapter_name="new"))
        assert not model.training
    kept = [k for k in loaded[0] if ".v." in k]
    assert loaded[0].keys() == loaded[1].keys() and len(kept) == 4
    assert all(torch.equal(loaded[0][k], loaded[1][k]) for k in kept)
