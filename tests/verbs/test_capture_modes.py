"""train() / eval() and .to(device) act on a captured graph as on the model; what it cannot do, it refuses."""

import contextlib
import copy

import pytest
import torch
import transformers as hf
from families import TEXT, ConvNet, assert_equal, outputs_and_gradients
from torch import nn

import peft_fx


class Network(nn.Module):
    """Linear layers around what a test passes in; `within`: a context for the middle one."""

    def __init__(self, middle=None, within=contextlib.nullcontext):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.middle, self.within = middle or nn.Identity(), within

    def forward(self, x):
        h = self.one(x)
        with self.within():
            h = self.middle(self.two(h) + torch.arange(6, device=x.device))
        return self.three(h.to(x.dtype))


class Modal(nn.Module):
    """A middle layer whose forward gets (x, training)."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(self, x)


def build(*args, **kwargs):
    torch.manual_seed(0)
    return Network(*args, **kwargs)


def capture(model, **options):
    return peft_fx.capture(model, (torch.randn(3, 4),), **options)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


# Middle layers whose two modes differ in literals only.
MODAL = {
    "dropout": lambda: nn.Dropout(0.5),
    "functional dropout": lambda: Modal(lambda m, x: nn.functional.dropout(x, 0.3, m.training)),
    "dropout of zero": lambda: nn.Dropout(0.0),
    "alpha dropout": lambda: nn.AlphaDropout(0.4),
    "feature dropout": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Dropout1d(0.4), nn.Flatten()),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm without statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "attention": lambda: Modal(
        lambda m, x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.4 * m.training)[
            0
        ]
    ),
    "randomised relu": lambda: nn.RReLU(),
    "a factor": lambda: Modal(lambda m, x: x * (0.5 if m.training else 2.0)),
}
CONTEXTS = {
    "plainly": contextlib.nullcontext,
    "under autocast": autocast,
    "under no_grad": torch.no_grad,
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("middle", MODAL)
def test_modes_act_as_on_the_model_however_often_they_switch(middle, context):
    model = build(MODAL[middle](), CONTEXTS[context])
    reference, graph = copy.deepcopy(model), capture(model)
    assert not graph.peft_fx.mode.locked
    assert graph.training
    for training in (True, False, False, True, False, True):
        reference.train(training), graph.train(training)
        assert graph.training == training
        assert_equal(graph, reference, (torch.randn(5, 4),), atol=0, rtol=0)
        for (name, wanted), (_, buffer) in zip(reference.named_buffers(), buffers(graph), strict=True):
            assert torch.equal(wanted, buffer), name


def buffers(graph):
    return [(n, b) for n, b in graph.named_buffers() if not n.startswith("peft_fx.")]


@pytest.mark.parametrize("training", [True, False])
def test_the_graph_starts_in_the_models_mode_and_leaves_the_model_in_it(training):
    model = ConvNet().train(training)
    model.bn1.eval()
    modes = [m.training for m in model.modules()]
    graph = peft_fx.capture(model, kwargs={"x": torch.randn(2, 3, 8, 8)})
    assert graph.training == training
    assert [m.training for m in model.modules()] == modes


def test_batch_norms_counter_counts_in_training_only():
    graph = peft_fx.capture(ConvNet(), kwargs={"x": torch.randn(2, 3, 8, 8)})
    seen = []
    for training in (True, True, False, True, False, False):
        graph.train(training)(x=torch.randn(4, 3, 8, 8))
        seen.append(int(graph.bn1.num_batches_tracked))
    assert seen == [1, 2, 2, 3, 3, 3]


def test_adapted_graphs_follow_the_mode_apart_from_their_base():
    graph = capture(build(nn.Dropout(0.5), autocast))
    tuned = peft_fx.apply(graph, {"peft_type": "LORA", "r": 2, "target_modules": ["one", "two"]})
    x = torch.randn(64, 4)
    tuned.eval()
    assert graph.training and not tuned.training
    assert torch.equal(tuned(x), tuned(x))
    assert not torch.equal(graph(x), graph(x))
    graph.eval()
    assert torch.equal(graph(x), tuned(x))


def test_an_adapter_on_a_linear_inside_autocast_gives_the_weight_forms_numbers():
    model = build(nn.Dropout(0.5), autocast)
    tuned = peft_fx.apply(
        capture(model), {"peft_type": "LORA", "r": 2, "target_modules": ["two"], "init_lora_weights": False}
    )
    reference = copy.deepcopy(model)
    A, B = (next(p for n, p in tuned.named_parameters() if f"lora_{x}" in n) for x in "AB")
    with torch.no_grad():
        reference.two.weight += (8 / 2) * B @ A
    x = torch.randn(5, 4)
    for training in (True, False):
        tuned.train(training), reference.train(training)
        torch.manual_seed(1)
        got = tuned(x)
        torch.manual_seed(1)
        torch.testing.assert_close(got, reference(x), atol=1e-6, rtol=1e-6)
    got.sum().backward()
    assert A.grad.abs().sum() > 0 and B.grad.abs().sum() > 0


# Models whose modes differ in structure: the graph has the mode it was captured in, and says so.
STRUCTURAL = {
    "noise": lambda m, x: x + torch.randn_like(x) if m.training else x,
    "another constant": lambda m, x: x * torch.tensor([1.0] * 6 if m.training else [2.0] * 6),
    "another parameter": lambda m, x: x * (m.a if m.training else m.b),
    "another operand": lambda m, x: (x - m.a) - (x if m.training else m.a),
    "another operator": lambda m, x: torch.sigmoid(x) if m.training else torch.tanh(x),
}


@pytest.mark.parametrize("context", [contextlib.nullcontext, autocast], ids=["plainly", "under autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", STRUCTURAL)
def test_a_model_whose_modes_differ_in_structure_is_locked_to_its_own(name, training, context):
    model = build(Modal(STRUCTURAL[name], a=torch.randn(6), b=torch.randn(6)), context).train(training)
    graph = capture(model)
    assert graph.training == training
    assert_equal(graph, copy.deepcopy(model), (torch.randn(5, 4),), atol=0, rtol=0)
    other = "eval" if training else "train"
    with pytest.raises(peft_fx.GraphError, match=f"has no {other} mode, it was captured in .* mode only: .+"):
        graph.train(not training)
    assert graph.peft_fx.mode.training == training
    assert_equal(graph.train(training), copy.deepcopy(model), (torch.randn(5, 4),), atol=0, rtol=0)


def test_a_locked_graph_names_the_operator_and_its_module():
    graph = capture(build(Modal(STRUCTURAL["noise"])))
    assert graph.peft_fx.mode.locked == (
        "train mode runs aten::randn_like in middle where eval mode runs aten::linear in three"
    )


def speech():
    return hf.Wav2Vec2Model(
        hf.Wav2Vec2Config(**TEXT, conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(4, 4), num_feat_extract_layers=2,
                          num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    )  # fmt: skip


def test_a_model_that_only_evaluation_can_capture_is_captured_in_evaluation():
    model = speech().eval()
    graph = peft_fx.capture(model)
    values = torch.randn(2, 4000)
    torch.testing.assert_close(graph(input_values=values)[0], model(values)[0], atol=1e-6, rtol=1e-6)
    with pytest.raises(
        peft_fx.GraphError, match="no train mode.*Wav2Vec2Model cannot be captured in train mode.*Remedy"
    ):
        graph.train()


def test_a_training_model_that_only_evaluation_can_capture_is_refused_with_the_remedy():
    with pytest.raises(peft_fx.CaptureError, match=r"in train mode.*Remedy: .*model\.eval\(\)"):
        peft_fx.capture(speech())


# Devices and dtypes. The meta device stands for any other.


@pytest.mark.parametrize("convert", [
    lambda g: g.to(torch.bfloat16), lambda g: g.half(), lambda g: g.double(), lambda g: g.bfloat16(),
    lambda g: g.to("meta", torch.float16),
], ids=["to(bfloat16)", "half", "double", "bfloat16", "to(device, dtype)"])  # fmt: skip
def test_another_dtype_is_refused_before_anything_is_converted(convert):
    graph = capture(build(nn.BatchNorm1d(6)))
    before = {n: (id(t), t.dtype, t.device) for n, t in graph.state_dict(keep_vars=True).items()}
    with pytest.raises(peft_fx.GraphError, match="capture it again"):
        convert(graph)
    assert {n: (id(t), t.dtype, t.device) for n, t in graph.state_dict(keep_vars=True).items()} == before


class Positions(nn.Module):
    """Creates tensors on its input's device, also inside an autocast region."""

    def __init__(self):
        super().__init__()
        self.scale, self.dropout = nn.Parameter(torch.ones(4)), nn.Dropout(0.5)

    def forward(self, x):
        y = x * self.scale + torch.arange(4, device=x.device)
        with torch.no_grad():
            y = y + torch.ones(4, device=x.device)
        with autocast():
            return self.dropout(y + torch.zeros(4, device=x.device))


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_moved_to_another_device_runs_there(training):
    graph = peft_fx.capture(Positions(), (torch.randn(3, 4),)).to("meta").train(training)
    assert graph(torch.randn(5, 4, device="meta")).device.type == "meta"
    assert {b.device.type for b in graph.buffers()} == {"meta"}


def test_an_adapted_graph_moves_with_its_adapters():
    tuned = peft_fx.apply(capture(build()), {"peft_type": "LORA", "r": 2, "target_modules": ["two"]}).to("meta")
    assert {p.device.type for p in tuned.parameters()} == {"meta"}
    assert tuned(torch.randn(3, 4, device="meta")).device.type == "meta"


# Copies, compilers and other people's passes.


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_deep_copy_keeps_everything_and_shares_nothing(context):
    graph = capture(build(nn.Dropout(0.5), CONTEXTS[context]))
    other = copy.deepcopy(graph)
    assert list(other.state_dict()) == list(graph.state_dict())
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in graph.parameters()}
    assert other.meta["peft_fx"].table == graph.meta["peft_fx"].table
    other.eval()
    assert graph.training and graph.peft_fx.mode.training and not other.peft_fx.mode.training
    tuned = peft_fx.apply(other, {"peft_type": "LORA", "r": 2, "target_modules": ["two"]})
    x = torch.randn(3, 4)
    assert torch.equal(tuned(x), graph.eval()(x))


@pytest.mark.parametrize("context", CONTEXTS)
def test_torch_compile_takes_the_whole_graph_in_both_modes(context):
    graph = capture(build(nn.Dropout(0.5), CONTEXTS[context]))
    reference = copy.deepcopy(graph)
    torch._dynamo.reset()
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    for training in (True, False, True):
        graph.train(training), reference.train(training)
        assert_equal(compiled, PrefixedNames(reference), (torch.randn(5, 4),), atol=1e-6)


class PrefixedNames(nn.Module):
    """A module whose parameters have the names that torch.compile gives them."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *args):
        return self._orig_mod(*args)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_captured_graph_can_be_exported_again(context, training):
    graph = capture(build(nn.Dropout(0.5), CONTEXTS[context])).train(training)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(graph, (torch.randn(3, 4),), dynamic_shapes=({0: batch},), strict=False)
    x = torch.randn(5, 4)
    outputs = [outputs_and_gradients(m, (x,))[0] for m in (program.module(), graph)]
    torch.testing.assert_close(*outputs)


def test_an_fx_interpreter_runs_it():
    graph = capture(build(nn.Dropout(0.5), autocast)).eval()
    x = torch.randn(5, 4)
    assert torch.equal(tensor_of(torch.fx.Interpreter(graph).run(x)), graph(x))


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def test_a_pass_that_drops_meta_leaves_a_graph_that_runs_and_verbs_say_what_is_missing():
    graph = capture(build(nn.Dropout(0.5))).eval()
    rebuilt = torch.fx.Transformer(graph).transform()
    x = torch.randn(5, 4)
    assert torch.equal(tensor_of(rebuilt(x)), graph(x))
    with pytest.raises(peft_fx.GraphError, match=r"dropped gm\.meta: copy the meta over"):
        peft_fx.apply(rebuilt, {"peft_type": "LORA", "target_modules": ["two"]})
    rebuilt.meta.update(graph.meta)
    peft_fx.apply(rebuilt, {"peft_type": "LORA", "target_modules": ["two"]})
