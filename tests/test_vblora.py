"""VB-LoRA files that hold the chosen rows of the bank instead of logits."""

import conformance as c
import peft
import pytest
from safetensors.torch import load_file

import peft_fx as fx

OPTIONS = {
    "peft_type": "VBLORA", "target_modules": ["q_proj", "down_proj"], "r": 3, "num_vectors": 6, "vector_length": 4,
    "topk": 3, "save_only_topk_weights": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    theirs = c.peft_model("llama", OPTIONS)
    return theirs, c.save_peft(theirs, tmp_path / "theirs")


def test_peft_s_short_file_runs_and_merges_as_in_peft(folder):
    theirs, path = folder
    tuned = fx.load_adapter(c.captured("llama"), path)
    assert c.error(c.run(tuned, "llama"), c.run(theirs, "llama")) <= 1e-5
    assert c.error(c.run(fx.merge(tuned), "llama"), c.run(theirs, "llama")) <= 1e-5


def test_a_short_file_is_written_as_it_was_read(folder, tmp_path):
    theirs, path = folder
    fx.save_adapter(fx.load_adapter(c.captured("llama"), path), tmp_path / "ours")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "ours"))
    assert {k: t.dtype for k, t in after.items()} == {k: t.dtype for k, t in before.items()}
    assert c.error(after, before) == 0
    again = c.quiet(peft.PeftModel.from_pretrained, c.build("llama"), tmp_path / "ours").eval()
    assert c.error(c.run(again, "llama"), c.run(theirs, "llama")) <= 1e-5
