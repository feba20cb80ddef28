"""Adapted modules as PEFT's layers: recognised, and looked into under PEFT's names."""

import copy
import io
import subprocess
import sys
from types import MappingProxyType

import peft
import pytest
import torch
from accelerate import cpu_offload
from graphs import model_of
from peft.tuners.tuners_utils import BaseTunerLayer as PeftsLayer
from peft.utils import ModulesToSaveWrapper as PeftsWrapper
from peft_fx.tuners.lora import Linear, LoraLayer
from peft_fx.tuners.tuners_utils import BaseTunerLayer
from peft_fx.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

import peft_fx
from peft_fx.methods import INTERNAL, METHODS, get_config


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.head(self.two(self.norm(self.one(self.embed(x)))))


IDS = torch.arange(6)[None]
LORA = dict(r=2, target_modules=["one", "embed"], modules_to_save=["head"], init_lora_weights=False)
# what a method needs for eight features, and the module to look at
FIELDS = {
    "ADALORA": dict(total_step=10), "ADAMSS": dict(r=4, num_subspaces=2, subspace_rank=1), "BOFT": dict(boft_block_size=4),
    "C3A": dict(block_size=4), "FOURIERFT": dict(n_frequency=4), "GRALORA": dict(r=4), "IA3": dict(feedforward_modules=[]),
    "LILY": dict(r=2), "LN_TUNING": dict(target_modules=["norm"]), "MISS": dict(r=2), "OFT": dict(oft_block_size=4),
    "PSOFT": dict(r=2), "RANDLORA": dict(r=2), "ROAD": dict(group_size=4), "SHIRA": dict(r=2), "SUPERTUNING": dict(sparsity=0.5),
    "TRAINABLE_TOKENS": dict(target_modules=["embed"], token_indices=[1, 2]), "VBLORA": dict(vector_length=4, num_vectors=8),
    "WAVEFT": dict(n_frequency=4),
}  # fmt: skip
JOINED = {"ADAMSS", "TINYLORA"}  # one tensor here, several in PEFT's layers, or those of all groups


def tuned(library=peft_fx, **config):
    torch.manual_seed(0)
    return library.get_peft_model(Net(), library.LoraConfig(**{**LORA, **config})).eval()


def inside(model):
    return model.base_model.model


def shapes(layer) -> dict:
    """Name below the layer -> shape, of the adapter's trained tensors."""
    found = {}
    for name in layer.adapter_layer_names:
        for held in getattr(layer, name).values():
            named = held.named_parameters() if isinstance(held, nn.Module) else [("", held)]
            found |= {f"{name}.{leaf}": tuple(tensor.shape) for leaf, tensor in named}
    return found


@pytest.mark.parametrize("peft_type", sorted(METHODS.keys() - INTERNAL))
def test_layers_are_of_pefts_classes_with_tensors_under_its_names(peft_type):
    config = get_config(peft_type)
    fields = {"target_modules": ["one", "two"], **FIELDS.get(peft_type, {})}
    ours = inside(peft_fx.get_peft_model(Net(), config(**fields)))
    theirs = inside(peft.get_peft_model(Net(), getattr(peft, config.__name__)(**fields)))
    (path,) = {"one", "norm", "embed"} & {n for n, m in theirs.named_modules() if isinstance(m, PeftsLayer)}
    layer, expected = getattr(ours, path), getattr(theirs, path)
    assert (
        isinstance(layer, type(expected))
        and isinstance(layer, BaseTunerLayer)
        and isinstance(layer, type(Net().get_submodule(path)))
    )
    assert peft_type in JOINED or shapes(layer) == shapes(expected)
    assert not isinstance(ours.head, (PeftsLayer, BaseTunerLayer))


def test_kinds_wrappers_and_what_a_module_was():
    model = inside(tuned(trainable_token_indices=None))
    assert isinstance(model.one, Linear) and isinstance(model.one, nn.Linear) and not isinstance(model.embed, Linear)
    assert isinstance(model.embed, (LoraLayer,)) and isinstance(model.embed, peft.tuners.lora.Embedding)
    assert isinstance(model.head, ModulesToSaveWrapper) and isinstance(model.head, PeftsWrapper)
    assert not isinstance(model.head, (BaseTunerLayer, PeftsLayer))  # TRL refuses heads that are
    assert repr(model.one) == repr(Net().one) and type(model.one).__module__ == nn.Linear.__module__
    rows = inside(tuned(trainable_token_indices={"embed": [1]}, target_modules=["one"]))
    assert isinstance(rows.embed, TrainableTokensWrapper) and rows.embed.trainable_tokens_delta["default"].shape == (
        1,
        8,
    )
    attention = peft_fx.get_peft_model(
        nn.ModuleDict({"x": nn.MultiheadAttention(8, 2)}), {"peft_type": "LORA", "target_modules": ["x"]}
    )
    assert isinstance(inside(attention)["x"], peft.tuners.lora.layer.MultiheadAttention)


def test_peft_imported_later_knows_them():
    """And where it never is, nothing is missed."""
    script = """
import sys, torch, peft_fx
from torch import nn
from peft_fx.tuners.tuners_utils import BaseTunerLayer
model = peft_fx.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft_fx.LoraConfig(target_modules=["0"]))
layer = model.base_model.model[0]
assert isinstance(layer, BaseTunerLayer) and "peft" not in sys.modules
from peft.tuners.lora import Linear
assert isinstance(layer, Linear)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_copies_pickles_and_compilers_take_them():
    model = tuned()
    expected = model(IDS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(IDS), expected)
        head, own = inside(other).head, [id(p) for p in other.parameters()]
        assert (
            isinstance(inside(other).one, PeftsLayer)
            and id(head.weight) in own
            and head.weight is not inside(model).head.weight
        )
    for compiled in (
        torch.compile(model, backend="aot_eager", fullgraph=True),
        torch.export.export(model, (IDS,)).module(),
    ):
        torch.testing.assert_close(compiled(IDS), expected)


def test_unload_gives_the_classes_back():
    model = tuned()
    base = model.unload()
    assert {type(m) for m in base.modules()} == {Net, nn.Linear, nn.Embedding, nn.LayerNorm}
    assert not any(name.startswith("_peft_fx") for m in base.modules() for name in vars(m))
    assert base.state_dict().keys() == Net().state_dict().keys()


# What a layer holds


@pytest.mark.parametrize("library", [peft, peft_fx], ids=lambda library: library.__name__)
def test_scales_are_read_and_written(library):
    model = tuned(library, lora_alpha=16, rank_pattern={"embed": 3})
    one, embed = inside(model).one, inside(model).embed
    assert one.r == {"default": 2} and embed.r == {"default": 3} and one.lora_alpha == {"default": 16}
    assert dict(one.scaling) == {"default": 8.0} and embed.scaling["default"] == 16 / 3
    before = model(IDS)
    one.scale_layer(2)
    assert one.scaling["default"] == 16 and not torch.equal(model(IDS), before)
    one.scaling["default"] = one.scaling["default"] / 4
    one.unscale_layer(0.5)
    assert one.scaling["default"] == 8.0 and torch.equal(model(IDS), before)
    one.set_scale("default", 0.5)
    assert one.scaling["default"] == 4 and embed.scaling["default"] == 16 / 3
    one.unscale_layer()
    assert torch.equal(model(IDS), before)


def test_a_written_scale_outlives_a_cast():
    model = tuned()
    inside(model).one.set_scale("default", 0.5)
    before = model(IDS)
    torch.testing.assert_close(model.double()(IDS), before.double(), atol=1e-5, rtol=1e-5)


def test_factors_are_the_adapters_own():
    model = tuned()
    layer, x = inside(model).one, torch.randn(3, 8)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x) + 4 * B(A(x)))
    assert any(A.weight is p for p in model.parameters())
    B.weight = nn.Parameter(torch.zeros_like(B.weight))
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.lora_B["default"].weight.data += 1
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 4 * layer.lora_B["default"](A(x)))
    for refused in (
        lambda: layer.lora_A.pop("default"),
        lambda: layer.lora_A.update({}),
        lambda: layer.r.update(default=3),
    ):
        with pytest.raises((TypeError, AttributeError)):
            refused()
    with pytest.raises(AttributeError, match="set_adapter"):
        layer.merged_adapters = []
    assert isinstance(layer.r, MappingProxyType) and not len(layer.lora_embedding_A)


def test_saved_modules_are_read_as_the_copy_that_acts():
    model = tuned()
    head = inside(model).head
    trained = head.modules_to_save["default"]
    assert head.weight is trained.weight and head.weight.requires_grad and not head.original_module.weight.requires_grad
    with torch.no_grad():
        head.weight.add_(1)
    x = torch.randn(2, 8)
    assert torch.equal(head(x), trained(x)) and not torch.equal(head(x), head.original_module(x))
    with model.disable_adapter():
        assert head.weight is head.original_module.weight and torch.equal(head(x), head.original_module(x))
    assert model.unload().head.weight is head.weight and not head.weight.requires_grad


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_read(bias):
    one = inside(tuned(bias=bias)).one
    assert one.bias.requires_grad and one.bias is not one._parameters["bias"] and not one.weight.requires_grad


def test_rows_are_read_with_the_head_that_is_tied_to_them():
    model = peft_fx.get_peft_model(
        model_of("tied_llama"), peft_fx.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 4])
    )
    inner = inside(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n).zero_()
    for module in (inner.lm_head, inner.model.embed_tokens):
        assert not module.weight[[1, 4]].any() and module.weight[[0, 2, 3]].any(1).all() and module.weight.requires_grad


# Done through one module


def test_loops_over_layers_set_enable_merge_and_delete():
    model = tuned()
    model.add_adapter("other", peft_fx.LoraConfig(**LORA))
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]
    plain, default = inside(tuned()), model(IDS)
    with model.disable_adapter():
        base = model(IDS)
    for layer in layers:
        layer.set_adapter("other")
    assert model.active_adapters == ["other"] == layers[0].active_adapters and not torch.equal(model(IDS), default)
    trained = {n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"other"} and plain is not inside(model)
    for layer in layers:
        layer.enable_adapters(False)
    assert (
        torch.equal(model(IDS), base)
        and layers[0].disable_adapters
        and not any(p.requires_grad for p in model.parameters())
    )
    for layer in layers:
        layer.enable_adapters(True)
    assert not torch.equal(model(IDS), base) and {
        n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad
    } == {"other"}
    for layer in layers:
        layer.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and torch.equal(model(IDS), default)


def test_a_loop_that_scales_each_layer_before_it_merges_it():
    """diffusers' fuse_lora; the first merge is of all layers, those scaled later are folded anew."""
    model = tuned()
    before = model(IDS)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.scale_layer(0.25)
        layer.merge(safe_merge=True, adapter_names=None)
    merged = model(IDS)
    assert all(layer.merged and layer.merged_adapters == ["default"] for layer in layers)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(model(IDS), merged)
    for layer in layers:
        layer.unscale_layer()
    assert torch.equal(model(IDS), before) and not torch.allclose(merged, before)


# The adapters as a part of the model


def test_a_kept_base_trains_casts_and_saves_its_adapters():
    base = Net()
    peft_fx.get_peft_model(base, peft_fx.LoraConfig(**LORA))  # the result is dropped
    before = base(IDS).detach()
    optimiser = torch.optim.SGD([p for p in base.parameters() if p.requires_grad], lr=0.1)
    base(IDS).square().mean().backward()
    optimiser.step()
    assert not torch.equal(base(IDS), before)
    assert base.double()(IDS).dtype == torch.float64 and {p.dtype for p in base.parameters()} == {torch.float64}
    assert any(name.startswith("peft_adapters.default.head.on_weight") for name in base.state_dict())


def test_loops_over_all_modules_find_tensors_where_they_are_called_so():
    model = tuned(bias="all")
    for module in model.modules():
        for name in ("weight", "bias"):
            assert torch.is_tensor(getattr(module, name, torch.empty(0))) or getattr(module, name) is None
    assert model.base_model.prefix == "peft_adapters."
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(model.base_model.prefix in name for name in trained)


def test_base_state_dicts_have_no_adapters_in_them():
    model = tuned()
    state = peft_fx.get_base_model_state_dict(model)
    assert state.keys() == Net().state_dict().keys()
    assert not peft_fx.set_base_model_state_dict(model, state).missing_keys
    with pytest.raises(RuntimeError, match="lacks one.bias"):
        peft_fx.set_base_model_state_dict(model, {k: t for k, t in state.items() if k != "one.bias"})


def test_state_dicts_of_earlier_versions_are_read():
    model, other = tuned(), tuned()
    with torch.no_grad():
        [p.add_(1) for p in model.parameters() if p.requires_grad]
    former = {
        k.replace("base_model.model.peft_adapters.", "base_model.adapters.").replace(".on_", "."): t
        for k, t in model.state_dict().items()
    }
    other.load_state_dict(former)
    assert torch.equal(other(IDS), model(IDS))


# Modules that others move and replace


def test_a_module_in_place_of_an_adapted_one_gets_its_adapters_or_is_refused():
    model = tuned()
    base, expected = inside(model), model(IDS)
    new, old = nn.Linear(8, 8), base.one
    new.load_state_dict({k: t for k, t in old.get_base_layer().state_dict().items()})
    base.one = new
    torch.testing.assert_close(model(IDS), expected)
    assert isinstance(new, BaseTunerLayer) and type(old) is nn.Linear
    base.one = nn.Linear(8, 9)
    with pytest.raises(
        peft_fx.PeftFxError, match=r"one.weight: adapted as Linear with \[8, 8\], now Linear with \[9, 8\]"
    ):
        model(IDS)
    base.one = new.get_base_layer()  # as tools take adapters off
    with model.disable_adapter():
        plain = model(IDS)
    base.embed = base.embed.get_base_layer()
    model.set_adapter("default")
    assert (
        not torch.equal(model(IDS), expected)
        and not isinstance(base.one, BaseTunerLayer)
        and plain.shape == expected.shape
    )


def test_layers_are_cut_but_not_moved():
    torch.manual_seed(0)
    net = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])})
    net.forward = lambda x: torch.stack([layer(x) for layer in net["layers"]]).sum(0)
    model = peft_fx.get_peft_model(
        net, {"peft_type": "LORA", "target_modules": ["0", "1", "2"], "init_lora_weights": False}
    )
    x, layers = torch.randn(2, 4), net["layers"]
    net["layers"] = layers[:2]
    expected = layers[0](x) + layers[1](x)
    torch.testing.assert_close(model(x), expected)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), expected)
    net["layers"] = layers[1:2]
    with pytest.raises(peft_fx.PeftFxError, match=r"layers.0: what was layers.1 has come there"):
        model(x)


def test_resizing_is_refused_where_an_adapter_has_the_size():
    for fields in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ):
        model = peft_fx.get_peft_model(model_of("biased_llama"), peft_fx.LoraConfig(**fields))
        with pytest.raises(
            peft_fx.PeftFxError, match="resize_token_embeddings: adapters are on .*(lm_head|embed_tokens)"
        ):
            model.resize_token_embeddings(99)
        assert model.resize_token_embeddings() is model.get_input_embeddings()
    model = peft_fx.get_peft_model(model_of("biased_llama"), peft_fx.LoraConfig(target_modules=["q_proj"]))
    assert model.resize_token_embeddings(99).num_embeddings == 99


def test_offloaded_adapters_come_back_for_a_call():
    for called in (False, True):
        model = tuned()
        expected = tuned()(IDS)
        if called:
            model(IDS)
        cpu_offload(model, execution_device="cpu")
        torch.testing.assert_close(model(IDS), expected)
        assert all(p.is_meta for p in model.parameters())


def test_a_models_layers_are_reached_through_the_tuner():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])
    model = peft_fx.get_peft_model(model, peft_fx.LoraConfig(target_modules=["0"]))
    assert model.base_model.layers is model.get_base_model().layers
    assert model.base_model.layers[0].active_adapters == ["default"]


def test_a_model_that_calls_its_children_in_turn():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    model = peft_fx.get_peft_model(copy.deepcopy(base), {"peft_type": "LORA", "target_modules": ["0"]})
    torch.testing.assert_close(model(x), base(x))


@pytest.mark.parametrize("library", [peft, peft_fx], ids=["peft", "peft_fx"])
@pytest.mark.parametrize("options", [{"modules_to_save": ["head"]}, {"trainable_token_indices": {"embed": [1]}}])
def test_a_wrappers_active_adapters_are_those_on_it(library, options):
    model = library.get_peft_model(Net(), library.LoraConfig(target_modules=["one"]))
    model.add_adapter("other", library.LoraConfig(target_modules=["one"], **options))
    base = model.get_base_model()
    wrapper = base.head if "modules_to_save" in options else base.embed
    for name, on_it in (("default", []), ("other", ["other"]), ("default", [])):
        model.set_adapter(name)
        assert base.one.active_adapters == [name] and wrapper.active_adapters == on_it
