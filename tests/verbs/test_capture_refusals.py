"""What cannot be captured is refused with module, cause and remedy, and leaves the model as it was."""

import pytest
import tiny
import torch
from captures import Signature, Single, X, capture
from torch import nn

import peft_fx


def branching(x):
    return x * 2 if x.sum() > 0 else x


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 4), nn.ModuleList([nn.Identity()])
        self.inner.append(type("Gate", (nn.Module,), {"forward": lambda self, x: branching(x)})())

    def forward(self, x):
        return self.inner[1](self.linear(x))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=None)

    def forward(self, x):
        return self.norm(x)


class Chosen(Signature):
    """A size that depends on data, and a branch on it."""

    def forward(self, x):
        rows = x[x.sum(1) > 0]
        return self.linear(rows) if rows.shape[0] else x


REFUSALS = {
    "a branch on data": (lambda: (Branching(), (X,)), r"Branching cannot be captured in \w+ mode: in module inner\.1 \(Gate\).*torch\.where"),
    "no inputs for a plain module": (lambda: (Single(), ()), r"Single needs example inputs: capture\(model, args=\(x,\)\)"),
    "a branch on a size that depends on data": (lambda: (Chosen(), (X,)), r"Chosen cannot be captured in \w+ mode: .*torch\.where"),
    "not a model": (lambda: (lambda x: x, (X,)), "takes an nn.Module or an ExportedProgram, got function"),
    "an error of the model's own": (lambda: (Single(), (torch.randn(3, 5),)), r"in module linear \(Linear\).*Remedy"),
    "batch norm that reads its counter": (lambda: (Counting(), (X,)), r"in train mode: in module norm \(BatchNorm1d\).*model\.eval\(\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_captured_is_refused_with_module_cause_and_remedy(name):
    make, message = REFUSALS[name]
    model, args = make()
    with pytest.raises(peft_fx.CaptureError, match=message) as error:
        peft_fx.capture(model, args)
    assert "\n" not in str(error.value)


def test_a_hugging_face_model_with_unknown_inputs_asks_for_them():
    model = tiny.llama()
    model.main_input_name = "waves"
    with pytest.raises(
        peft_fx.CaptureError, match=r"takes 'waves'.*pass kwargs=\{'waves': \.\.\.\} to capture \(known: input_ids"
    ):
        peft_fx.capture(model)


def test_a_failed_capture_leaves_mode_and_config_as_they_were():
    model = Branching().eval()
    with pytest.raises(peft_fx.CaptureError):
        capture(model, X)
    assert not any(m.training for m in model.modules())
    t5 = tiny.t5()
    with pytest.raises(peft_fx.CaptureError):
        peft_fx.capture(t5, kwargs={"input_ids": X})
    assert t5.config.use_cache and t5.decoder.config.use_cache and t5.training
