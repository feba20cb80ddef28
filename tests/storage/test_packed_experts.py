"""Stacks of experts that bitsandbytes' parametrization packs, and a packed embedding: captured, adapted, merged."""

import copy

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn

import peft_fx

IDS = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(0))
CONFIG = {
    "target_parameters": ["experts.gate_up_proj"],
    "target_modules": ["embed"],
    "r": 2,
    "init_lora_weights": False,
}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 32) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(4, 32, 64) * 0.1)

    def forward(self, x):
        return torch.bmm(torch.relu(torch.bmm(x, self.gate_up_proj.mT)), self.down_proj.mT)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.experts = nn.Embedding(40, 64), nn.Linear(64, 32), Experts()

    def forward(self, ids):
        h = torch.tanh(self.inner(self.embed(ids)))
        return self.experts(h.reshape(4, -1, 32))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Routed()
    replace_parameter_4bit(model.experts, "gate_up_proj", quant_type="nf4", compress_statistics=False)
    replace_parameter_4bit(model.experts, "down_proj", quant_type="nf4")
    embedding = bitsandbytes.nn.EmbeddingNF4(40, 64)
    embedding.load_state_dict(model.embed.state_dict())
    model.embed = embedding.to("cpu")
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def graph(model):
    return peft_fx.capture(model, (IDS,))


@pytest.fixture(scope="module")
def tuned(graph):
    torch.manual_seed(1)
    return peft_fx.apply(graph, peft_fx.LoraConfig(**CONFIG))


def test_the_graph_computes_the_same_and_looks_rows_up(model, graph):
    assert torch.equal(graph(IDS), model(IDS))
    assert "packed_embedding" in graph.code
    assert dict(graph.named_modules())["experts.gate_up_proj_packed"].shape == (4, 64, 32)


def test_adapters_train_and_merge(tuned, graph):
    y = tuned(IDS)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in tuned.parameters() if p.requires_grad)
    assert (y - graph(IDS)).abs().max() > 0.01
    merged = peft_fx.merge(tuned, storage="dense")
    assert (merged(IDS) - y).abs().max() < 1e-5
    assert torch.equal(peft_fx.unmerge(merged)(IDS), y)
    assert not torch.equal(peft_fx.merge(tuned, storage="requantize")(IDS), y)


def test_the_face_adapts_them_too(model, tuned):
    mine = peft_fx.get_peft_model(copy.deepcopy(model), peft_fx.LoraConfig(**CONFIG))
    ours = [p for p in mine.parameters() if p.requires_grad]
    for p, q in zip(ours, [p for p in tuned.parameters() if p.requires_grad], strict=True):
        p.data.copy_(q)
    y = mine(IDS)
    assert (y - tuned(IDS)).abs().max() < 1e-6
    with mine.disable_adapter():
        assert torch.equal(mine(IDS), model(IDS))
    with pytest.warns(UserWarning, match="packed"):
        mine.merge_adapter()
    assert not torch.equal(mine(IDS), y)
    mine.unmerge_adapter()
    assert torch.equal(mine(IDS), y)
