"""The page on errors: its code raises the messages that it shows, word for word, and the remedies work."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import build

import peft_fx

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:^```text\n(.*?)^```$)?", re.M | re.S)


@pytest.fixture(scope="module")
def graph():
    return peft_fx.capture(build("llama").eval())


@pytest.fixture
def world(graph, tmp_path, monkeypatch):
    """The names that the page takes for granted, and the folders that it reads."""
    monkeypatch.chdir(tmp_path)
    lora = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    tuned = peft_fx.apply(graph, lora)
    peft_fx.save_adapter(tuned, "my-adapter")
    peft_fx.save_adapter(peft_fx.apply(graph, lora | {"r": 32}), "wide-adapter")
    other = peft_fx.get_peft_model(build("tied_llama"), peft_fx.LoraConfig(target_modules=["q_proj"]))
    other.base_model.model.config.name_or_path = ""
    other.save_pretrained("adapter-of-another-model")
    return {"peft_fx": peft_fx, "torch": torch, "model": build("llama").eval(), "tied_model": build("tied_llama").eval(),
            "graph": graph, "tuned": tuned, "ids": torch.arange(1, 25).view(2, 12)}  # fmt: skip


def same(message: str, shown: str) -> bool:
    """Whether a message is the one that is shown, where `...` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, shown.strip().split("..."))), message, re.S) is not None


@pytest.mark.parametrize("section", SECTIONS)
def test_the_code_raises_what_is_shown_below_it_and_the_remedy_runs(section, world):
    blocks = BLOCK.findall(SECTIONS[section])
    assert blocks
    for code, shown in blocks:
        if not shown:
            exec(code, world)
            continue
        with pytest.raises((peft_fx.PeftFxError, RuntimeError)) as caught:
            exec(code, world)
        message = f"{type(caught.value).__name__}: {caught.value}"
        assert same(message, shown), textwrap.shorten(message, 400)
