"""VB-LoRA in PEFT: Linear, Conv1D."""

import torch

SMALL = {"r": 3, "num_vectors": 6, "vector_length": 4}
PEFT = [
    (SMALL, "wide wide_without_bias square wide_Conv1D"),
    (SMALL | {"topk": 1, "init_logits_std": 0.5, "init_vector_bank_bound": 0.3}, "wide"),
    (SMALL | {"topk": 3}, "wide"),
    (SMALL | {"target_modules": ["q_proj", "up_proj"]}, "llama"),
    (SMALL | {"target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (SMALL, "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d"),
    (SMALL, "wide_embedding"),
]
REFUSED = [
    (SMALL, "wide_norm", "matrices"),
    (SMALL | {"vector_length": 5}, "wide", "nearest valid: 4"),
    (SMALL | {"topk": 7}, "wide", "nearest valid: 6"),
]


def definition(W, b, tensors, options):
    bank, k = tensors["/vblora_vector_bank"], options.get("topk", 2)

    def block(logits):
        chosen = logits.argsort(descending=True)[:k]
        weights = logits[chosen].exp() / logits[chosen].exp().sum()
        return sum(w * bank[i] for w, i in zip(weights, chosen, strict=True))

    A = torch.stack([torch.cat([block(x) for x in row]) for row in tensors["vblora_logits_A"]])
    B = torch.cat([torch.stack([block(x) for x in tile], dim=1) for tile in tensors["vblora_logits_B"]])
    return W + (B @ A).reshape(W.shape), b
