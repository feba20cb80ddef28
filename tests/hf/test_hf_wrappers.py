"""A PeftModel inside of torch.compile's, FSDP 1's and data-parallel wrappers is found by every function that takes one."""

import copy

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import peft_fx
from peft_fx.store.unwrap import is_compiled, unwrapped


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.lin1(self.lin0(x))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        return self.conv(x)


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(rank=4, targets=("lin0", "lin1"), lib=peft_fx):
    torch.manual_seed(0)
    base = Small()
    torch.manual_seed(rank)
    config = lib.LoraConfig(r=rank, target_modules=list(targets), init_lora_weights=False)
    return lib.get_peft_model(base, config).eval()


X = torch.linspace(-1, 1, 16).view(2, 8)
WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "sharded": lambda m: FullyShardedDataParallel(m, use_orig_params=True, device_id="cpu"),
    "parallel": nn.parallel.DistributedDataParallel,
    "compiled parallel": lambda m: torch.compile(nn.parallel.DistributedDataParallel(m), backend="eager"),
    "sharded compiled": lambda m: FullyShardedDataParallel(
        torch.compile(m, backend="eager"), use_orig_params=True, device_id="cpu"
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_functions_see_through_wrappers(wrap, tmp_path):
    adapted(3).save_pretrained(tmp_path)
    model, inner = WRAPPERS[wrap](adapted()), adapted()
    assert type(unwrapped(model)) is peft_fx.PeftModel
    assert peft_fx.get_layer_status(model) == inner.get_layer_status()
    assert peft_fx.get_model_status(model) == inner.get_model_status()
    found, expected = peft_fx.get_peft_model_state_dict(model), peft_fx.get_peft_model_state_dict(inner)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    halved = {key: tensor / 2 for key, tensor in expected.items()}
    for each in (model, inner):
        result = peft_fx.set_peft_model_state_dict(each, halved)
        assert result.missing_keys == [] == result.unexpected_keys
    torch.testing.assert_close(model(X), inner(X))
    if "sharded" not in wrap:
        peft_fx.hotswap_adapter(model, tmp_path, "default")
        torch.testing.assert_close(model(X), adapted(3)(X))
    peft_fx.functional.set_requires_grad(model, "default", False)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters." in n)


def test_a_compiled_base_is_no_wrapper_of_the_model_around_it():
    base = torch.compile(Small(), backend="eager")
    tuned = peft_fx.get_peft_model(base._orig_mod, peft_fx.LoraConfig(target_modules=["lin0"]))
    assert unwrapped(tuned) is tuned and not is_compiled(tuned)


RANKS = [(4, 7), (7, 4)]


@pytest.mark.parametrize("there, new", RANKS)
def test_an_adapter_of_any_rank_is_swapped_in_where_nothing_is_compiled(there, new, tmp_path):
    source = adapted(new, ["lin0"], peft)
    source.save_pretrained(tmp_path / "new")
    model = adapted(there)
    model.save_pretrained(tmp_path / "there")
    before = model(X)
    peft_fx.hotswap_adapter(model, tmp_path / "new", "default")
    torch.testing.assert_close(model(X), source(X))
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(adapted().unload()), tmp_path / "again")
    torch.testing.assert_close(again(X), source(X))
    peft_fx.hotswap_adapter(model, tmp_path / "there", "default")
    torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize("there, new", RANKS)
def test_a_convolutions_graph_follows_the_rank(there, new, tmp_path):
    x, models = torch.linspace(-1, 1, 300).view(1, 3, 10, 10), {}
    for rank in (there, new):
        torch.manual_seed(0)
        config = peft_fx.LoraConfig(r=rank, target_modules=["conv"], init_lora_weights=False)
        models[rank] = peft_fx.get_peft_model(Convolution(), config).eval()
    models[there](x)
    models[new].save_pretrained(tmp_path)
    peft_fx.hotswap_adapter(models[there], tmp_path, "default")
    torch.testing.assert_close(models[there](x), models[new](x))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_refused_swap_changes_nothing(compiled, tmp_path):
    other = peft_fx.get_peft_model(Small(), peft_fx.LoraConfig(r=7, target_modules=["lin0", "lin1"]))
    other.save_pretrained(tmp_path)
    model = adapted(targets=["lin0", "lin1"] if compiled else ["lin0"])
    called = torch.compile(model, backend="eager") if compiled else model
    before, tensors = called(X), dict(model.named_parameters())
    with pytest.raises(peft_fx.HotswapError, match="nothing was changed"):
        peft_fx.hotswap_adapter(called, tmp_path, "default")
    assert torch.equal(called(X), before) and model.peft_config["default"].r == 4
    assert all(tensors[name] is p for name, p in model.named_parameters())


def test_what_is_compiled_in_place_counts_as_compiled(tmp_path):
    adapted(7).save_pretrained(tmp_path)
    model = adapted()
    model.compile(backend="eager")
    with pytest.raises(peft_fx.HotswapError, match="does not fit the slot"):
        peft_fx.hotswap_adapter(model, tmp_path, "default")
