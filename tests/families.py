"""Model families for the capture tests: per row a tiny model with its dropouts on, and inputs of any size for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import nn
from torch.utils import _pytree as pytree

import peft_fx

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
ROTARY = {
    **TEXT,
    "num_key_value_heads": 2,
    "attention_dropout": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**ROTARY, "head_dim": 8, "sliding_window": 4}
DROPOUTS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


# Inputs: (batch, length, generator) -> keyword arguments. Pad masks are partly zero, labels distinct and partly masked.


def tokens(batch: int, length: int, random) -> torch.Tensor:
    return torch.randint(3, 40, (batch, length), generator=random)


def padding(batch: int, length: int) -> torch.Tensor:
    """Ones, but for one leading place of the first row."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 0] = 0
    return mask


def text(batch, length, random):
    return {"input_ids": tokens(batch, length, random), "attention_mask": padding(batch, length)}


def causal_labels(batch, length, random):
    labels = tokens(batch, length, random)
    labels[0, :2] = -100
    return {**text(batch, length, random), "labels": labels}


def classes(batch, length, random):
    labels = torch.arange(batch) % 2
    return {**text(batch, length, random), "labels": labels}


def plain_text(batch, length, random):
    return {"input_ids": tokens(batch, length, random), "attention_mask": torch.ones(batch, length, dtype=torch.long)}


def seq2seq(batch, length, random):
    return {**text(batch, length, random), "decoder_input_ids": tokens(batch, length - 2, random)}


def seq2seq_labels(batch, length, random):
    labels = tokens(batch, length - 2, random)
    labels[0, -1] = -100
    return {**text(batch, length, random), "labels": labels}


def speech(batch, length, random):
    return {"input_features": torch.randn(batch, 8, 20, generator=random),
            "decoder_input_ids": tokens(batch, length, random)}  # fmt: skip


def picture(batch, length, random):
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=random)}


def picture_and_text(batch, length, random):
    return {**text(batch, length, random), **picture(batch, length, random)}


def tensor(*shape):
    return lambda batch, length, random: {"x": torch.randn(batch, *shape, generator=random)}


def signal(batch, length, random):
    return {"x": torch.randn(batch, 3, 5 + length, generator=random)}


# Models that are not Hugging Face's.


class ConvNet(nn.Module):
    """Convolution, batch norm, dropout, pooling."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8)
        self.dropout, self.head = nn.Dropout2d(0.2), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.dropout(torch.relu(self.bn2(self.conv2(x))))
        return self.head(x.mean((2, 3)))


class Signal(nn.Module):
    """One-dimensional convolutions of several kinds."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv1d(3, 4, 3, padding="same")
        self.reflect = nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect", dilation=1)
        self.norm, self.alpha = nn.GroupNorm(2, 4), nn.AlphaDropout(0.1)
        self.up = nn.ConvTranspose1d(4, 2, 2, stride=2)

    def forward(self, x):
        return self.up(self.alpha(self.norm(self.reflect(self.same(x)))))


@dataclass(frozen=True)
class Family:
    """numbers: inputs for comparing. example: inputs for `capture`; None lets it build them from the model's config.
    slow: the quick run leaves it out.

    sizes: (batch, length) at which the graph must equal the model; the capture was made at another or at the first one.
    """

    build: Callable[[], nn.Module]
    numbers: Callable
    example: Callable | None = None
    sizes: tuple[tuple[int, int], ...] = ((2, 7), (3, 9), (1, 5), (7, 7))
    slow: bool = False


FAMILIES = {
    "llama": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROTARY)), text),
    "llama labels": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROTARY)), causal_labels, causal_labels, slow=True),
    "llama tied": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROTARY, tie_word_embeddings=True)), text, slow=True),
    "qwen3": Family(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**ROTARY, head_dim=8)), text, slow=True),
    "gemma2": Family(lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)), text, slow=True),
    "gemma3": Family(
        lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"])), text, slow=True),
    "gpt2": Family(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)), text),
    "opt": Family(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
                         word_embed_proj_dim=16, max_position_embeddings=32, attention_dropout=0.1)), text),
    "bert": Family(lambda: hf.BertModel(hf.BertConfig(**TEXT, max_position_embeddings=32)), text, slow=True),
    "bert classes": Family(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, max_position_embeddings=32)), classes, classes),
    "roberta": Family(
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT, max_position_embeddings=32, pad_token_id=1)), text, slow=True),
    "deberta": Family(
        lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
                               share_att_key=True, norm_rel_ebd="layer_norm", max_position_embeddings=32)),
        text, slow=True),
    "t5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40,
                        decoder_start_token_id=0)), seq2seq, slow=True),
    "t5 labels": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40,
                        decoder_start_token_id=0)), seq2seq_labels, seq2seq_labels, slow=True),
    "bart": Family(
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40,
                          max_position_embeddings=32, attention_dropout=0.1)), seq2seq, slow=True),
    "whisper": Family(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                             decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40,
                             num_mel_bins=8, max_source_positions=10, max_target_positions=12, pad_token_id=0,
                             bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.1,
                             attention_dropout=0.1)), speech, slow=True),
    "mixtral": Family(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**ROTARY, num_local_experts=4)), text, slow=True),
    "vit": Family(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**TEXT, **DROPOUTS, image_size=16, patch_size=8)), picture, slow=True),
    "clip": Family(
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config={**TEXT, "max_position_embeddings": 16, "attention_dropout": 0.1, "eos_token_id": 2},
                          vision_config={**TEXT, "image_size": 16, "patch_size": 8, "attention_dropout": 0.1},
                          projection_dim=8)), picture_and_text, slow=True),
    "resnet": Family(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], layer_type="basic")), picture),
    "mamba": Family(
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=40, time_step_rank=4)), plain_text,
        sizes=((2, 7), (3, 7), (1, 7)), slow=True),  # the scan is unrolled over the length
    "conv net": Family(ConvNet, tensor(3, 9, 9), tensor(3, 9, 9)),
    "conv 1d": Family(Signal, signal, signal),
}  # fmt: skip


def captured(family: Family):
    """(model, its graph), freshly built."""
    torch.manual_seed(0)
    model = family.build()
    example = family.example(2, 7, torch.Generator().manual_seed(1)) if family.example else None
    return model, peft_fx.capture(model, kwargs=example)


def tensors(output) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def outputs_and_gradients(module, inputs, seed=5):
    """The tensors that a call returns, and every parameter's gradient of the sum of their mean squares."""
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = tensors(module(**inputs) if isinstance(inputs, dict) else module(*inputs))
    sum(o.float().pow(2).mean() for o in outputs if o.requires_grad).backward()
    return outputs, {n: p.grad for n, p in module.named_parameters()}


def assert_equal(module, reference, inputs, atol=2e-6, rtol=1e-5):
    """Same outputs, and the same gradient for every parameter, None included."""
    outputs, gradients = outputs_and_gradients(module, inputs)
    wanted, wanted_gradients = outputs_and_gradients(reference, inputs)
    torch.testing.assert_close(outputs, wanted, atol=atol, rtol=rtol)
    assert list(gradients) == list(wanted_gradients)
    for name, gradient in wanted_gradients.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(
                gradients[name], gradient, atol=max(atol, rtol * gradient.abs().max().item()), rtol=rtol
            )
