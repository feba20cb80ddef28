"""The code in README.md and on the pages of docs/ runs, as it stands, on a small model."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny import build

import peft_fx

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]


def code(page, heading):
    """The Python under a heading."""
    _, _, section = (ROOT / page).read_text().partition(f"\n## {heading}\n")
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", section.partition("\n## ")[0], re.M | re.S))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The names that the pages' code takes for granted, and the folders that it reads."""
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(1, 25).view(2, 12)
    graph = peft_fx.capture(build("llama"))
    for folder, rank in (("another-adapter", 8), ("adapters/sql", 4), ("adapters/poems", 32)):
        config = peft_fx.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
        peft_fx.save_adapter(peft_fx.apply(graph, config), folder)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: build("llama"))
    arguments = transformers.TrainingArguments(
        output_dir="run", max_steps=2, report_to=[], use_cpu=True, per_device_train_batch_size=1
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    return {"peft_fx": peft_fx, "torch": torch, "Trainer": transformers.Trainer, "model": build("llama"),
            "arguments": arguments, "data": data, "ids": ids, "batches": [ids, ids.flip(0)]}  # fmt: skip


def test_the_twenty_lines_of_the_readme(world):
    exec(code("README.md", "Twenty lines"), world)
    call = {"input_ids": world["ids"], "attention_mask": torch.ones_like(world["ids"])}
    other = peft_fx.load_adapter(world["graph"], "another-adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(world["fast"](**call).logits, other(**call).logits, rtol=1e-4, atol=1e-5)
    assert Path("my-adapter/adapter_model.safetensors").is_file() and Path("model.pt2").is_file()


def test_a_script_of_pefts_with_its_import_changed(world):
    exec(code("README.md", "Coming from PEFT"), world)
    assert Path("my-adapter/adapter_config.json").is_file()


def test_serving_in_a_process_of_ones_own(world, capsys):
    exec(code("docs/serving.md", "In a process of your own"), world)
    assert "sql" in capsys.readouterr().out


def test_a_script_with_peft_fx_in_pefts_place(world, capsys):
    exec(code("docs/ecosystem.md", "In a script"), world)
    assert "peft_fx" in capsys.readouterr().out and isinstance(world["tuned"], peft_fx.PeftModel)
