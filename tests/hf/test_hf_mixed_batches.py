"""`adapter_names=`: each row of a batch with its own adapter, in calls and in `generate`."""

import copy

import peft
import pytest
import torch
from graphs import inputs, model_of
from torch import nn

import peft_fx

NAMES = ["a", "__base__", "b", "a"]
WAYS = {"greedy": {}, "beam": {"num_beams": 3}, "sampling": {"do_sample": True}}


def both(name, folder, **config):
    """(PEFT's model, ours) with adapters a and b, from PEFT's files."""
    base = model_of(name).eval()
    reference = None
    for i, adapter in enumerate("ab"):
        torch.manual_seed(i)
        one = peft.LoraConfig(
            **{"r": 4 + i, "lora_alpha": 64, "target_modules": "all-linear", "init_lora_weights": False, **config}
        )
        if reference is None:
            reference = peft.get_peft_model(copy.deepcopy(base), one, adapter_name=adapter)
        else:
            reference.add_adapter(adapter, one)
    reference.save_pretrained(folder)
    model = peft_fx.PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    return reference.eval(), model


def four(name):
    """A batch of four rows."""
    return {k: v.repeat(4, 1)[:4] if v.dim() == 2 else v for k, v in inputs(name).items()}


def generated(model, x, **options):
    torch.manual_seed(3)
    return model.generate(**x, max_new_tokens=6, pad_token_id=0, **{"do_sample": False, **options})


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return both("tied_llama", tmp_path_factory.mktemp("llama"), task_type="CAUSAL_LM")


def test_each_row_has_its_adapter(llamas):
    _, model = llamas
    found, expected = (m(**four("tied_llama"), adapter_names=NAMES).logits for m in llamas)
    torch.testing.assert_close(found, expected)
    for i, name in enumerate(NAMES[:3]):
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            if name != "__base__":
                model.set_adapter(name)
            torch.testing.assert_close(found[i], model(**four("tied_llama")).logits[i])
    assert (found[0] - found[2]).abs().max() > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_generated_tokens_are_pefts(llamas, way):
    x = {**four("tied_llama")}
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    found, expected = (generated(m, x, adapter_names=NAMES, **WAYS[way]) for m in reversed(llamas))
    assert torch.equal(found, expected)
    assert way == "sampling" or not torch.equal(found, generated(llamas[1], x, **WAYS[way]))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["greedy", "beam"])
def test_an_encoder_and_a_decoder(tmp_path, way):
    pair = both("t5", tmp_path, task_type="SEQ_2_SEQ_LM")
    x = {"input_ids": four("t5")["input_ids"]}
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    found, expected = (generated(m, x, adapter_names=NAMES, **WAYS[way]) for m in pair)
    assert torch.equal(found, expected)


def test_embeddings_and_saved_modules(tmp_path):
    pair = both(
        "tied_llama",
        tmp_path,
        target_modules=["embed_tokens", "q_proj"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    found, expected = (m(**four("tied_llama"), adapter_names=NAMES).logits for m in pair)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("config", [
    {"peft_type": "LORA", "use_dora": True}, {"peft_type": "OFT", "oft_block_size": 4}, {"peft_type": "IA3"}, {"peft_type": "VERA", "r": 4},
    {"peft_type": "HRA", "r": 2}, {"peft_type": "LORA", "target_parameters": ["gate_up_proj", "down_proj"], "target_modules": []},
], ids=lambda c: "_".join(map(str, c)))  # fmt: skip
def test_methods_that_peft_refuses_here(config):
    """Each row is what its adapter alone gives."""
    name = "mixtral" if "target_parameters" in config else "tied_llama"
    targets = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        **({"feedforward_modules": ["down_proj"]} if config["peft_type"] == "IA3" else {}),
    }
    model = peft_fx.get_peft_model(model_of(name).eval(), {**targets, **config}, adapter_name="a").eval()
    model.add_adapter("b", {**targets, **config})
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.base_model.adapters.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = four(name)
    found = model(**x, adapter_names=NAMES).logits
    for i, adapter in enumerate(NAMES[:3]):
        with model.disable_adapter() if adapter == "__base__" else torch.no_grad():
            if adapter != "__base__":
                model.set_adapter(adapter)
            torch.testing.assert_close(found[i], model(**x).logits[i])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_what_is_refused(llamas):
    _, model = llamas
    x = four("tied_llama")
    for m in llamas:
        with pytest.raises(ValueError, match="existing|no adapter"):
            m(**x, adapter_names=["a", "b", "c", "a"])
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            m(**x, adapter_names=["a", "b"])
        with pytest.raises(ValueError, match="training mode"):
            m.train()(**x, adapter_names=NAMES)
        m.eval().merge_adapter(["a"])
        with pytest.raises(ValueError, match="merged adapters"):
            m(**x, adapter_names=NAMES)
        m.unmerge_adapter()
    model(**x, adapter_names=NAMES)
    with model.disable_adapter():
        torch.testing.assert_close(model(**x, adapter_names=NAMES).logits, model(**x).logits)


def test_an_attention_whose_batch_is_its_second_dimension_is_refused():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = peft_fx.get_peft_model(Net(), {"peft_type": "LORA", "target_modules": ["attention"]}).eval()
    with pytest.raises(TypeError, match="batch_first"):
        model(torch.randn(4, 2, 8), adapter_names=["default"] * 4)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.gru = nn.Linear(4, 4), nn.GRU(4, 4, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.gru(self.lin(x))[0]


def test_outputs_that_have_no_row_for_each_input_are_refused():
    config = peft_fx.LoraConfig(target_modules=["lin"], modules_to_save=["gru"])
    model = peft_fx.get_peft_model(Recurrent(), config).eval()
    model.add_adapter("other", peft_fx.LoraConfig(target_modules=["lin"], modules_to_save=["gru"]))
    with pytest.raises(TypeError, match="gru: adapter_names needs outputs whose first dimension is the batch"):
        model(torch.randn(4, 3, 4), adapter_names=["default", "default", "other", "other"])
