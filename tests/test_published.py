"""Scripts that PEFT publishes, in the same order of calls, with its import and with ours: the same numbers, tokens and files.

The two libraries draw an adapter's first numbers differently, so ours starts from those that PEFT's run began with.
"""

import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from words import llama, mt5, roberta, sentences, tokenizer

import peft_fx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SCRIPTS = sorted((Path(__file__).parent / "published").glob("*.py"))
CLOSE = dict(rtol=1e-5, atol=1e-6)
ABORTED = "terminate called without an active exception"  # by a thread of torch's, now and then, when all is done


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """What the scripts read: models with their tokenizers, sentences, and adapters of one model."""
    folder, draw = tmp_path_factory.mktemp("world"), random.Random(0)
    for make in (llama, mt5, roberta):
        torch.manual_seed(0)
        model, template = make()
        with torch.no_grad():
            for p in model.parameters() if make is not mt5 else ():
                p.mul_(4 if p.dim() > 1 else 1)  # at transformers' scale tiny models say the same to everything
        model.save_pretrained(folder / make.__name__)
        tokenizer(template).save_pretrained(folder / make.__name__)
    (folder / "sentences.json").write_text(
        json.dumps({n: [*sentences(k, draw)] for n, k in (("train", 24), ("test", 8))})
    )
    for seed, name in enumerate(("english", "portuguese", "sql")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=16, init_lora_weights=False, target_modules="all-linear"
        )
        model = peft.get_peft_model(hf.LlamaForCausalLM.from_pretrained(folder / "llama"), config)
        model.peft_config["default"].base_model_name_or_path = "llama"
        model.save_pretrained(folder / "adapters" / name)
    return folder


def furnish(folder, world):
    """A folder to run in, with all that the scripts read."""
    folder.mkdir()
    for path in world.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def run(script, library, folder, world, monkeypatch):
    """What a script found, with the library in place of its import; it reads and writes in `folder`."""
    furnish(folder, world)
    (folder / script.name).write_text(script.read_text().replace(" peft_fx ", f" {library.__name__} "))
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        found = runpy.run_path(str(folder / script.name))["results"]
    return json.loads(json.dumps(found))


def compare(found, expected, where="results"):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            compare(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list) and any(isinstance(x, (dict, str)) for x in expected):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            compare(one, other, f"{where}[{i}]")
    elif isinstance(expected, (list, float)):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **CLOSE, msg=lambda m: f"{where}: {m}")
    else:
        assert found == expected, where


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_the_script_gives_what_it_gives_with_peft(script, world, tmp_path, monkeypatch):
    expected, found = (run(script, lib, tmp_path / lib.__name__, world, monkeypatch) for lib in (peft, peft_fx))
    compare(found, expected)
    if losses := expected.get("losses"):
        assert sum(losses[-4:]) < sum(losses[:4])
    written = {p.parent.relative_to(tmp_path / "peft") for p in (tmp_path / "peft").rglob("adapter_model.safetensors")}
    for folder in written:
        theirs, ours = (load_file(tmp_path / lib / folder / "adapter_model.safetensors") for lib in ("peft", "peft_fx"))
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_launched_processes_together_give_the_losses_of_one_with_peft(processes, world, tmp_path, monkeypatch):
    script = SCRIPTS[0].parent / "launched" / "data_parallel.py"
    expected = run(script, peft, tmp_path / "peft", world, monkeypatch)
    folder = furnish(tmp_path / "peft_fx", world)
    # "--multi_gpu" is the launcher's word for several processes; on a CPU they talk through gloo
    several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *(several if processes > 1 else ["--cpu"]), *options]
    done = subprocess.run([*launch, str(script)], cwd=folder, timeout=300, capture_output=True, text=True)
    assert not done.returncode or ABORTED in done.stderr, done.stderr
    found = json.loads((folder / "results.json").read_text())
    assert found["processes"] == processes
    compare(found["losses"], expected["losses"])
    theirs, ours = (
        load_file(tmp_path / lib / "adapter" / "english" / "adapter_model.safetensors") for lib in ("peft", "peft_fx")
    )
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)
