"""Tiny models for tests, one function per model; weights are seeded, nothing is downloaded."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **options}))


def tied_llama():
    return llama(tie_word_embeddings=True, num_hidden_layers=1)


def biased_llama():
    return llama(attention_bias=True)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16))


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL, max_position_embeddings=16))


def t5():
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0)
    )


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(**{**SMALL, "num_hidden_layers": 1}, num_key_value_heads=2, num_local_experts=4)
    )


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, (3, 2)), nn.Conv3d(3, 4, 2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.batch_norm = nn.BatchNorm2d(8)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.lin = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.other_widths = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)


class Experts(nn.Module):
    """A module with raw parameters, a child and a bias; `is_transposed` as some mixtures of experts have it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(3, 4, 6)), nn.Parameter(torch.zeros(3, 6, 4))
        self.flat, self.bias = nn.Parameter(torch.zeros(5, 4)), nn.Parameter(torch.zeros(4))
        self.is_transposed = True
        self.inner = nn.Linear(4, 4)


class Nested(nn.Module):
    """Names that look alike, a shared module, numbered layers and a list that has no forward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(4, 4), "up_proj": nn.Linear(4, 4)}) for _ in range(3)
        )
        self.experts = Experts()
        self.head, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.shared = self.head
        self.embedding, self.tied_head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


MODELS = {
    "llama": llama, "tied_llama": tied_llama, "biased_llama": biased_llama, "gpt2": gpt2, "bert": bert, "t5": t5,
    "mixtral": mixtral, "convolutions": Convolutions, "attention": Attention, "nested": Nested,
}  # fmt: skip


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]()
