"""What follows from an adapter's config is no state: no state dict has it, and no cast or move loses it."""

import copy
import io

import pytest
import torch
from graphs import captured, inputs, model_of, output, tuned
from torch import nn

import peft_fx
from peft_fx.verbs.tensors import adapters_of

TARGETS = {"target_modules": ["first", "second"]}
# method -> options for layers of 8 features, so that its tensors that follow from the config are there
METHODS = {
    "ADALORA": {"init_r": 4, "total_step": 9},
    "DEFT": {"r": 4, "alpha": 12},
    "DELORA": {"r": 3},
    "FOURIERFT": {"n_frequency": 8, "scaling": 3.3},
    "FROD": {"save_projection": False},
    "GLORA": {"r": 4, "config_A_B": "none"},
    "GRALORA": {"r": 4, "alpha": 5},
    "LILY": {"r": 4, "scaling": 1.7},
    "LOHA": {"r": 3, "alpha": 5},
    "LOKR": {"r": 3, "alpha": 5},
    "LORA": {"r": 3, "lora_alpha": 5},
    "PEANUT": {"r": 4, "scaling": 1.7},
    "PVERA": {"r": 4, "save_projection": False},
    "RANDLORA": {"r": 3, "randlora_alpha": 5, "save_projection": False},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9, "r": 3, "lora_alpha": 5},
    "TINYLORA": {"save_projection": False},
    "UNILORA": {"r": 4},
    "VERA": {"r": 4, "save_projection": False},
    "WAVEFT": {"n_frequency": 8, "scaling": 3.3, "use_idwt": True},
}
NO_ADVICE = pytest.mark.filterwarnings("ignore:.*save_projection=False")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def wrapped(method, net=None, **options):
    torch.manual_seed(0)
    config = {"peft_type": method, **TARGETS, **METHODS[method], **options}
    return peft_fx.get_peft_model((Net() if net is None else net).eval(), config).eval()


def derived(model, adapter="default"):
    """Name -> tensor of what follows from the adapter's config."""
    module = adapters_of(model).peft_fx.adapters._modules[adapter]
    found = dict(module.named_buffers())
    return {name: found[name].clone() for name in module.derived}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@NO_ADVICE
@pytest.mark.parametrize("method", METHODS)
def test_it_is_in_no_state_dict_and_survives_casts_moves_and_copies(method):
    model = wrapped(method)
    before = derived(model)
    assert before and not any(key.endswith(tuple(before)) for key in model.state_dict())
    random = torch.get_rng_state()
    assert same(derived(model.to(torch.bfloat16).float()), before)
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in derived(model.half()).items():  # no more is lost than the dtype cannot hold
        torch.testing.assert_close(tensor, before[name].to(tensor.dtype), rtol=0, atol=0)
    assert same(derived(model.float().to_empty(device="cpu")), before)
    assert same(derived(copy.deepcopy(model).half().float()), before)
    file = io.BytesIO()
    torch.save(model, file)
    assert same(derived(torch.load(io.BytesIO(file.getvalue()), weights_only=False).half().float()), before)


@NO_ADVICE
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"TINYLORA", "FROD", "DEFT", "GLORA"}))
def test_a_model_on_meta_gets_it_with_its_memory(method):
    with torch.device("meta"):
        net = Net()
    assert same(derived(wrapped(method, net).to_empty(device="cpu")), derived(wrapped(method)))


def test_a_resumed_run_with_another_scale_saves_what_acts(tmp_path):
    model, x = wrapped("LORA", lora_alpha=60, init_lora_weights=False), torch.randn(2, 8)
    other = wrapped("LORA", lora_alpha=6, init_lora_weights=False)
    with torch.no_grad():
        other.base_model.adapters.default.first.on_weight.lora_B.mul_(2)
    assert not model.load_state_dict(other.state_dict()).missing_keys
    assert torch.equal(model.base_model.adapters.default.first.on_weight.scaling, torch.tensor(20.0))
    model.save_pretrained(tmp_path)
    loaded = peft_fx.PeftModel.from_pretrained(Net(), tmp_path).eval()
    loaded.get_base_model().load_state_dict(model.get_base_model().state_dict())
    assert torch.equal(loaded(x), model(x)) and not torch.allclose(other(x), model(x))


def test_a_cast_after_a_swap_gives_what_was_swapped_in(tmp_path):
    wrapped("LORA", lora_alpha=60).save_pretrained(tmp_path / "a")
    model = wrapped("LORA")
    model.load_adapter(tmp_path / "a", "default")
    assert all(t == 20 for t in derived(model.half().float()).values())

    graph = tuned(captured("biased_llama"), {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj"]})
    peft_fx.save_adapter(
        tuned(captured("biased_llama"), {"r": 2, "lora_alpha": 9, "target_modules": ["q_proj"]}), tmp_path / "b"
    )
    wide = peft_fx.prepare_hotswap(graph, max_rank=8)
    peft_fx.hotswap(wide, tmp_path / "b")
    for made, scale in ((graph, 0.75), (wide, 4.5), (peft_fx.set_adapter(wide, "default"), 4.5)):
        made.peft_fx.adapters.half().float()
        assert all(t == scale for t in derived(made).values())


def test_slots_that_hold_a_smaller_adapter_keep_their_zeros(tmp_path):
    small, large = ({"peft_type": "SHIRA", "r": r, "target_modules": ["q_proj"]} for r in (1, 2))
    peft_fx.save_adapter(tuned(captured("biased_llama"), small), tmp_path)
    graph = peft_fx.prepare_hotswap(tuned(captured("biased_llama"), large), max_rank=3)
    peft_fx.hotswap(graph, tmp_path)
    before = derived(graph)
    graph.peft_fx.adapters.to_empty(device="cpu")
    assert same(derived(graph), before) and all(0 < t.sum() == t.numel() / 3 for t in before.values())


def moved(graph):
    """A graph whose adapters came into memory without numbers."""
    numbers = {name: p.detach().clone() for name, p in graph.peft_fx.adapters.named_parameters()}
    graph.peft_fx.adapters.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in graph.peft_fx.adapters.named_parameters():
            p.copy_(numbers[name])
    return graph


def exported(graph, tmp_path):
    peft_fx.export(graph, tmp_path / "a.pt2")
    return peft_fx.load(tmp_path / "a.pt2")


TOKENS = {"trainable_token_indices": {"lm_head": [3, 1]}}
JOURNEYS = {
    "deepcopy": (TOKENS, lambda graph, tmp_path: copy.deepcopy(graph)),
    "export and load": (TOKENS, exported),
    "merge and unmerge": (TOKENS, lambda graph, tmp_path: peft_fx.unmerge(peft_fx.merge(graph))),
    "slots": ({}, lambda graph, tmp_path: peft_fx.reserve(graph, slots=2)),
}


@pytest.mark.parametrize("options, journey", JOURNEYS.values(), ids=JOURNEYS)
def test_a_graph_keeps_it_wherever_it_goes(options, journey, tmp_path):
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "embed_tokens"], **options}
    graph = tuned(captured("biased_llama"), config)
    expected, before = output(graph, "biased_llama"), derived(graph)
    there = journey(graph, tmp_path)
    assert not [
        key for key in there.state_dict() if key.startswith("peft_fx.adapters.") and key.endswith(tuple(before))
    ]
    torch.testing.assert_close(output(moved(there), "biased_llama"), expected)
    assert same(derived(there), before)


def test_an_injected_model_keeps_it():
    model = model_of("biased_llama")
    peft_fx.inject_adapter_in_model(peft_fx.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]), model)
    before = derived(model)
    assert same(derived(model.half().float()), before) and model(**inputs("biased_llama")) is not None
