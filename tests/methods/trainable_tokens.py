"""Trainable tokens in PEFT: Embedding, and a Linear head tied to it."""

IDS = {"token_indices": [5, 0, 9]}
PEFT = [
    (IDS, "wide_embedding"),
    (IDS | {"init_weights": False}, "wide_embedding"),
    (IDS | {"target_modules": ["embed_tokens"]}, "llama tied_llama"),
    (IDS | {"target_modules": None}, "llama tied_llama gpt2"),
]
DEFINED = [(IDS, "wide")]
EXCLUSIVE = True
REFUSED = [
    (IDS, "wide_norm wide_conv1d wide_conv2d wide_conv3d wide_Conv1D", "Linear head"),
    ({"token_indices": [3, 16]}, "wide_embedding", "outside its 16 tokens"),
    ({"token_indices": [3, 3]}, "wide_embedding", "each once"),
    ({}, "wide_embedding", "at least one"),
    (IDS | {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}, "mixtral", "no row per token"),
]


def definition(W, b, tensors, options):
    W = W.clone()
    for i, row in zip(options["token_indices"], tensors["trainable_tokens_delta"], strict=True):
        W[i] = row
    return W, b
