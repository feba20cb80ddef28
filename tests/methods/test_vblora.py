"""VB-LoRA with save_only_topk_weights: files that hold the chosen rows of the bank instead of logits."""

import conformance as c
import peft
import pytest
import torch
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
    assert all(torch.equal(after[k], t) for k, t in before.items() if k.endswith("_indices"))
    assert c.error(after, before) <= 1e-6
    again = c.quiet(peft.PeftModel.from_pretrained, c.build("llama"), tmp_path / "ours").eval()
    assert c.error(c.run(again, "llama"), c.run(theirs, "llama")) <= 1e-5


def test_what_was_trained_is_written_short_and_peft_runs_it(tmp_path):
    tuned = fx.apply(c.captured("llama"), OPTIONS)
    c.randomise(tuned)
    exact = c.run(tuned, "llama")
    fx.save_adapter(tuned, tmp_path)
    assert not [k for k in load_file(tmp_path / "adapter_model.safetensors") if k.endswith(("logits_A", "logits_B"))]
    theirs = c.quiet(peft.PeftModel.from_pretrained, c.build("llama"), tmp_path).eval()
    assert c.error(c.run(theirs, "llama"), exact) <= 1e-5
    assert c.error(c.run(fx.load_adapter(c.captured("llama"), tmp_path), "llama"), exact) <= 1e-5


def test_the_chosen_rows_alone_are_not_trained_on(folder):
    with pytest.raises(fx.AdapterFileError, match="3 largest logits .* load it for inference alone"):
        fx.load_adapter(c.captured("llama"), folder[1], trainable=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows + 250, "from 0 to 5"),
        (lambda rows: rows.float(), "from 0 to 5"),
        (lambda rows: rows[..., :1], "weights"),
    ],
    ids=["row", "type", "shape"],
)
def test_rows_that_the_bank_has_not_are_refused(folder, change, message):
    c.rewrite(folder[1], lambda t: {k: change(v) if k.endswith("_indices") else v for k, v in t.items()})
    with pytest.raises(fx.AdapterFileError, match=f"vblora_logits_A: expected .*{message}"):
        fx.load_adapter(c.captured("llama"), folder[1])
