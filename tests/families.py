"""Model families for the capture tests: a tiny model with every dropout on, and inputs of any size for it, per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf
from torch import nn

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
ROTARY = {**TEXT, "num_key_value_heads": 2, "attention_dropout": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
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
    """example: what is passed to `capture`; None lets it build inputs itself. numbers: inputs for comparing.

    batch_free: the batch may differ from the traced one. unused: parameters that get no gradient.
    atol: allowed difference in training where the captured operators draw or sum in another order (0: bit-equal).
    """

    build: Callable[[], nn.Module]
    numbers: Callable
    example: Callable | None = None
    slow: bool = False
    options: dict = field(default_factory=dict)


FAMILIES = {
    "llama": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROTARY)), text),
    "llama labels": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROTARY)), causal_labels, causal_labels),
    "llama tied": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROTARY, tie_word_embeddings=True)), text),
    "qwen3": Family(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**ROTARY, head_dim=8)), text),
    "gemma2": Family(lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)), text),
    "gemma3": Family(
        lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"])), text),
    "gpt2": Family(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)), text),
    "opt": Family(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
                         word_embed_proj_dim=16, max_position_embeddings=32, attention_dropout=0.1)), text),
    "bert": Family(lambda: hf.BertModel(hf.BertConfig(**TEXT, max_position_embeddings=32)), text),
    "bert classes": Family(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, max_position_embeddings=32)), classes, classes),
    "roberta": Family(
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT, max_position_embeddings=32, pad_token_id=1)), text),
    "t5": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40,
                        decoder_start_token_id=0)), seq2seq),
    "t5 labels": Family(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40,
                        decoder_start_token_id=0)), seq2seq_labels, seq2seq_labels),
    "bart": Family(
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40,
                          max_position_embeddings=32, attention_dropout=0.1)), seq2seq),
    "whisper": Family(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                             decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40,
                             num_mel_bins=8, max_source_positions=10, max_target_positions=12, pad_token_id=0,
                             bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.1,
                             attention_dropout=0.1)), speech),
    "mixtral": Family(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**ROTARY, num_local_experts=4)), text),
    "vit": Family(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**TEXT, **DROPOUTS, image_size=16, patch_size=8)), picture),
    "clip": Family(
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config={**TEXT, "max_position_embeddings": 16, "attention_dropout": 0.1, "eos_token_id": 2},
                          vision_config={**TEXT, "image_size": 16, "patch_size": 8, "attention_dropout": 0.1},
                          projection_dim=8)), picture_and_text),
    "resnet": Family(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], layer_type="basic")), picture),
    "mamba": Family(
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=40, time_step_rank=4)), plain_text),
    "conv net": Family(ConvNet, tensor(3, 9, 9), tensor(3, 9, 9)),
    "conv 1d": Family(Signal, signal, signal),
}  # fmt: skip
