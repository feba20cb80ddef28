"""Tiny models of some equal layers, one function per model."""

import transformers as hf

LLAMA = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2)
TEXT = {**LLAMA, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(layers=3):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, "num_hidden_layers": layers}))


def gemma():
    kinds = ["sliding_attention", "full_attention"] * 2
    config = hf.Gemma3TextConfig(**{**TEXT, "num_hidden_layers": 4}, head_dim=8, sliding_window=4, layer_types=kinds)
    return hf.Gemma3ForCausalLM(config)


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=16,
                                            bos_token_id=1, eos_token_id=2))  # fmt: skip


def bert():
    return hf.BertModel(hf.BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                      intermediate_size=24))  # fmt: skip


def t5():
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=3,
                                                     num_heads=2, pad_token_id=0, decoder_start_token_id=0))  # fmt: skip


def whisper():
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(
        vocab_size=32, d_model=16, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None))  # fmt: skip


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                                     intermediate_size=24, image_size=8, patch_size=4))  # fmt: skip


def mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=4))


def resnet():
    return hf.ResNetForImageClassification(hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[3, 2], layer_type="basic", downsample_in_first_stage=False,
        num_labels=3))  # fmt: skip
