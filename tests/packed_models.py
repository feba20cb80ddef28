"""Tiny Llamas whose linear layers bitsandbytes packs, and the same with dense weights of the same numbers."""

import bitsandbytes
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fx.storage.recognise import recognise

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 64,
}  # fmt: skip


def nf4(layer, **options):
    return bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
        **options,
    )


def int8(layer):
    return bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
    )


PACKERS = {"nf4": nf4, "int8": int8}


def quantized(layer, packer):
    """A layer of bitsandbytes with the numbers of a linear one. It does not repack them in its first evaluation."""
    new = packer(layer)
    new.load_state_dict(layer.state_dict())
    new = new.to("cpu").requires_grad_(False).train(layer.training)
    new.support_avx512bf16_for_cpu = False
    return new


def llama(packer=None, layers=2, like=None):
    """A model with packed layers; without a packer, one with the numbers of `like`, dense."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES)).eval()
    for path, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and path != "lm_head":
            if packer is None:
                layer.weight.data = recognise(like.get_submodule(path)).dense()
            else:
                model.set_submodule(path, quantized(layer, PACKERS[packer]))
    if packer is not None:  # what transformers says of a model that it has packed, and PEFT asks for
        setattr(model, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[packer], True)
    return model


def batch(rows=3, length=12):
    ids = torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
