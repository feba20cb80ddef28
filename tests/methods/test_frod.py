"""FRoD as an update beside other adapters: PEFT's sum of differences, and nothing at the start."""

import conformance as c
import peft
import torch

import peft_fx as fx

OPTIONS = {"peft_type": "FROD", "target_modules": ["layer"], "sparse_rate": 0.2, "progressbar": False}


def test_two_active_adapters_add_up_as_in_peft(tmp_path):
    tuned = fx.apply(c.captured("wide"), OPTIONS)
    for seed, folder in ((3, "one"), (9, "two")):
        c.randomise(tuned, seed)
        fx.save_adapter(tuned, tmp_path / folder)
    theirs = c.quiet(peft.PeftModel.from_pretrained, c.build("wide"), tmp_path / "one").eval()
    c.quiet(theirs.load_adapter, tmp_path / "two", "second")
    theirs.base_model.set_adapter(["default", "second"])
    both = fx.load_adapter(c.captured("wide"), tmp_path / "one")
    both = fx.set_adapter(fx.load_adapter(both, tmp_path / "two", "second"), ["default", "second"])
    assert c.error(c.run(both, "wide"), c.run(theirs, "wide")) <= 1e-5
    assert c.error(c.run(fx.merge(both), "wide"), c.run(theirs, "wide")) <= 1e-5


def test_it_starts_as_the_base_bit_for_bit_in_half_precision_too():
    for dtype in (torch.float32, torch.bfloat16):
        for subject in ("wide", "wide_Conv1D", "wide_conv2d"):
            base = c.captured(subject, dtype)
            pairs = zip(c.run(fx.apply(base, OPTIONS), subject, dtype), c.run(base, subject, dtype), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
