"""Files of methods that PEFT has renamed are read as what they are called today."""

import json

import conformance as c
import pytest
import torch

import peft_fx as fx


@pytest.mark.parametrize("mode", [True, "bat"])
def test_a_bone_file_is_read_as_miss_and_written_as_miss(mode, tmp_path):
    options = {"peft_type": "MISS", "target_modules": ["layer"], "r": 4, "init_weights": mode}
    tuned = fx.apply(c.captured("wide"), options)
    c.randomise(tuned)
    fx.save_adapter(tuned, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    old = {k: v for k, v in config.items() if k not in ("mini_r", "miss_dropout")} | {"peft_type": "BONE"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    c.rewrite(tmp_path, lambda tensors: {k.replace("miss_block", "bone_block"): t for k, t in tensors.items()})
    loaded = fx.load_adapter(c.captured("wide"), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(c.run(loaded, "wide"), c.run(tuned, "wide"), strict=True))
    fx.save_adapter(loaded, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["peft_type"] == "MISS"
