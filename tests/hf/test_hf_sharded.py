"""Parameters sharded over two processes, by torch's FSDP of either version and by accelerate: losses and files of one process."""

import json
import subprocess
import sys

import peft
import pytest
import sharded
import torch
from graphs import model_of
from peft_fx.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from sharded import KINDS, train

import peft_fx

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(losses, tensors) of PEFT's on one process."""
    folder = tmp_path_factory.mktemp("whole")
    return train(peft, None, folder), load_file(folder / "adapter_model.safetensors")


def assert_same(losses, folder, whole):
    assert losses == pytest.approx(whole[0], abs=1e-5) and losses[-1] < losses[0]
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == whole[1].keys()
    for key, tensor in whole[1].items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)


def test_one_process_gives_pefts_losses_and_files(whole, tmp_path):
    assert_same(train(peft_fx, None, tmp_path), tmp_path, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_the_losses_and_files_of_one_process(kind, whole, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", sharded.__file__]
    done = subprocess.run([*launch, "peft_fx", kind, tmp_path], timeout=300, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert_same(json.loads((tmp_path / "losses.json").read_text()), tmp_path, whole)


def test_what_is_sharded_on_its_own(monkeypatch):
    model = peft_fx.get_peft_model(model_of("biased_llama"), peft_fx.LoraConfig(target_modules=["q_proj"]))

    def chosen():
        policy = fsdp_auto_wrap_policy(model)
        return {type(m).__name__ for m in model.modules() if policy(m, recurse=False, nonwrapped_numel=1)}

    assert chosen() == {"LlamaDecoderLayer"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP, LlamaAttention")
    assert chosen() == {"LlamaMLP", "LlamaAttention"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,Nothing")
    with pytest.raises(TypeError, match="to wrap in the model: Nothing; set FSDP_TRANSFORMER_CLS_TO_WRAP"):
        chosen()
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    bare = peft_fx.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft_fx.LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="none is named"):
        fsdp_auto_wrap_policy(bare)
