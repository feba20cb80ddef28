"""Capture of deep models: three of a list of equal layers are traced, the others are stamped out."""

import logging
from collections import Counter

import pytest
import torch
import transformers as hf
from torch import nn

import peft_fx as fx

pytestmark = pytest.mark.slow

TEXT = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=6, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip


def ids():
    return {"input_ids": torch.randint(0, 32, (3, 6)), "attention_mask": torch.ones(3, 6).long()}


def llama(**more):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, **more}))


def whisper():
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(
        vocab_size=32, d_model=16, encoder_layers=5, decoder_layers=6, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, dropout=0.1))  # fmt: skip


def gemma():
    kinds = ["sliding_attention", "full_attention"] * 3
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4, layer_types=kinds))


def gpt2(**more):
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=6, n_head=2, n_positions=16,
                                            bos_token_id=1, eos_token_id=2, **more))  # fmt: skip


class Step(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index, self.linear = index, nn.Linear(4, 4)

    def forward(self, x, factor):
        return torch.tanh(self.linear(x)) * factor


class Chain(nn.Module):
    """Layers that get numbers which no attribute of theirs shows: the fifth one's is another."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Step(i) for i in range(6))

    def factor(self, layer):
        return 1.0 + (layer.index == 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.factor(layer))
        return x


class Indexed(Chain):
    """Layers whose numbers follow from their index."""

    def factor(self, layer):
        return 1 / (layer.index + 1)


SPEECH = {"input_features": torch.randn(3, 8, 20), "decoder_input_ids": torch.randint(0, 32, (3, 5))}
STAMPED = {
    "llama": (llama, ids(), "model.layers (6 layers)"),
    "gpt2": (gpt2, ids(), "transformer.h (6 layers)"),
    "whisper": (whisper, SPEECH, "model.encoder.layers (5 layers), model.decoder.layers (6 layers)"),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=4)), ids(), "model.layers (6"),
}  # fmt: skip
# model, inputs, why all layers are traced; "" where there is no list of equal layers to begin with
WHOLE = {
    "layers of two kinds": (gemma, ids(), ""),
    "numbers by layer": (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), ids(), ""),
    "numbers by index": (Indexed, {"x": torch.randn(2, 4)}, "traced differently"),
    "numbers from outside": (Chain, {"x": torch.randn(2, 4)}, "does not give the model's outputs"),
}


def capture(build, inputs, caplog, **options):
    torch.manual_seed(0)
    model = build()
    with caplog.at_level(logging.INFO, logger="peft_fx"):
        caplog.clear()
        return model, fx.capture(model, kwargs=inputs, **options), " ".join(r.message for r in caplog.records)


def calls(graph):
    return Counter((str(n.target), str(n.meta.get("val"))) for n in graph.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("name", STAMPED)
def test_a_stamped_graph_is_the_fully_traced_one(name, caplog):
    build, inputs, expected = STAMPED[name]
    model, graph, said = capture(build, inputs, caplog)
    assert said.startswith(f"stamped out: {expected}")
    _, whole, silent = capture(build, inputs, caplog, stamp=False)
    assert not silent and calls(graph) == calls(whole)
    assert list(graph.state_dict()) == list(whole.state_dict()) == list(model.state_dict())
    assert graph.meta["peft_fx"].table == whole.meta["peft_fx"].table
    for training in (True, False):
        graph.train(training), whole.train(training)
        torch.manual_seed(1)
        ours = graph(**inputs).logits
        torch.manual_seed(1)
        assert torch.equal(ours, whole(**inputs).logits)


@pytest.mark.parametrize("name", WHOLE)
def test_layers_that_are_not_provably_equal_are_all_traced_and_the_reason_is_logged(name, caplog):
    build, inputs, reason = WHOLE[name]
    model, graph, said = capture(build, inputs, caplog)
    assert ("all layers are traced" in said and reason in said) if reason else not said
    graph.eval(), model.eval()
    with torch.no_grad():
        ours, theirs = graph(**inputs), model(**inputs)
    ours, theirs = (getattr(y, "logits", y) for y in (ours, theirs))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [*STAMPED, *WHOLE])
def test_a_model_without_weights_is_captured_as_one_with_them(name, caplog):
    """As `peft-fx inspect` does: on the meta device there are no numbers to compare."""
    build, inputs, _ = {**STAMPED, **WHOLE}[name]
    _, graph, said = capture(build, inputs, caplog)
    with torch.device("meta"):
        _, empty, same = capture(build, {k: v.to("meta") for k, v in inputs.items()}, caplog)
    assert same == said and [n.name for n in empty.graph.nodes if n.op == "get_attr"] == [
        n.name for n in graph.graph.nodes if n.op == "get_attr"
    ]


def test_every_stamped_layer_has_adapters_and_gradients_of_its_own(caplog):
    model, graph, _ = capture(llama, ids(), caplog)
    tuned = fx.apply(graph, {"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "init_lora_weights": False})
    tuned(**ids()).logits.square().mean().backward()
    grads = {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}
    assert len(grads) == 6 * 7 * 2 and all(g is not None and g.abs().sum() > 0 for g in grads.values())
    assert not any(p.grad is not None for p in model.parameters())


def test_the_model_is_left_as_it_was(caplog):
    model, _, _ = capture(llama, ids(), caplog)
    assert len(model.model.layers) == 6 and model.training
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
