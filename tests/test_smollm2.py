"""The real model: training, swapping, merging and exporting SmolLM2-135M as PEFT would."""

import copy

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import peft_fx
from tools.text import blocks

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def real(smollm2):
    """(model, token blocks, base graph)."""
    model, tokenizer = smollm2
    data, _ = blocks(tokenizer, 48, 0)
    return model.eval(), data, peft_fx.capture(model)


@pytest.fixture(scope="module")
def start(real, tmp_path_factory):
    """The folder of an untrained adapter that PEFT made, and PEFT's model with it."""
    model = real[0]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    folder = tmp_path_factory.mktemp("start")
    theirs.save_pretrained(folder)
    return folder, theirs


METHODS = {
    "OFT": {"oft_block_size": 32},
    "FOURIERFT": {"n_frequency": 200, "scaling": 1.0},
    "VERA": {"r": 64},
}


def loss_of(model, ids, **options):
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def losses(model, data, steps=STEPS, **options):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for i in range(steps):
        loss = loss_of(model, data[2 * i : 2 * i + 2], **options)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_training_from_the_same_tensors_gives_pefts_losses(real, start):
    _, data, graph = real
    folder, theirs = start
    tuned = peft_fx.load_adapter(graph, folder, trainable=True)
    assert peft_fx.trainable_parameters(tuned) == theirs.get_nb_trainable_parameters()
    ours, expected = losses(tuned, data), losses(theirs, data, use_cache=False)
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) <= 1e-4
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("name", METHODS)
def test_twenty_steps_of_another_method_give_pefts_losses(real, name, tmp_path):
    model, data, graph = real
    torch.manual_seed(0)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[name](**METHODS[name], target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    tuned = peft_fx.load_adapter(graph, tmp_path, trainable=True)
    short = data[:, :16]
    ours, expected = losses(tuned, short, 20), losses(theirs, short, 20, use_cache=False)
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) <= 1e-3
    assert min(ours) < ours[0]


def test_swap_merge_unmerge_and_export_keep_the_numbers(real, start, tmp_path):
    model, data, graph = real
    ids = data[:2, :24]
    tuned = peft_fx.apply(graph, peft_fx.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    other = peft_fx.apply(graph, peft_fx.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    peft_fx.save_adapter(other, tmp_path / "other")
    with torch.no_grad():
        expected = loss_of(other, ids)
        report = peft_fx.hotswap(tuned, tmp_path / "other")
        assert len(report.zeroed) == 150 and report.padded == 2 * 210  # left-out targets take the new rank too
        assert (loss_of(tuned, ids) - expected).abs() <= 1e-5 * expected.abs()
        merged = peft_fx.merge(tuned)
        assert (loss_of(merged, ids) - expected).abs() <= 1e-5 * expected.abs()
        assert set(merged.state_dict()) == set(model.state_dict())
        back = peft_fx.unmerge(merged)
        assert all(torch.equal(back.state_dict()[n], t) for n, t in model.state_dict().items())
        peft_fx.export(merged, tmp_path / "merged.pt2")
        assert torch.equal(loss_of(peft_fx.load(tmp_path / "merged.pt2"), ids), loss_of(merged, ids))
