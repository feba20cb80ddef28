"""Integers in adapter files that point somewhere are checked before anything is computed with them."""

import conformance as c
import pytest
import torch

import peft_fx as fx

SHIRA = {"peft_type": "SHIRA", "r": 2}
SUPER = {"peft_type": "SUPERTUNING", "sparsity": 0.5}
UNILORA = {"peft_type": "UNILORA", "r": 2, "theta_d_length": 13, "save_indices": True}
# options, key, what is added to its integers, what is found
CASES = [
    (SHIRA, "shira_indices", 12, r"integers from 0 to less than \(\(12,\), \(8,\)\), got"),
    (SHIRA, "shira_indices", -12, "got -"),
    (SUPER, "supertuning_indices", 96, "less than 96, got"),
    (SUPER, "supertuning_indices", 0.5, "less than 96, got torch.float32"),
    (UNILORA, "unilora_indices_A", 13, "less than 13, got"),
    (UNILORA, "unilora_indices_B", -20, "less than 13, got -"),
]


@pytest.mark.parametrize(("options", "key", "change", "message"), CASES, ids=str)
def test_integers_out_of_range_are_refused_by_loads_and_hotswaps(options, key, change, message, tmp_path):
    tuned = fx.apply(c.captured("wide"), {**options, "target_modules": ["layer"]})
    fx.save_adapter(tuned, tmp_path)
    c.rewrite(tmp_path, lambda tensors: {k: t + change if k.endswith(key) else t for k, t in tensors.items()})
    before = {k: t.clone() for k, t in tuned.state_dict().items()}
    with pytest.raises(fx.AdapterFileError, match=f"{key}: expected .*{message}"):
        fx.load_adapter(c.captured("wide"), tmp_path)
    with pytest.raises(fx.AdapterFileError, match=f"{key}: expected .*{message}"):
        fx.hotswap(tuned, tmp_path)
    assert all(torch.equal(t, before[k]) for k, t in tuned.state_dict().items())
