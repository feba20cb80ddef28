"""Super-Tuning in PEFT: Linear."""

HALF, SUPRA = {"sparsity": 0.5}, {"sparsity": 0.8, "r": 3}
ELSEWHERE = "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d wide_embedding"
PEFT = [
    (HALF, "wide wide_without_bias"),
    (SUPRA, "wide wide_without_bias"),
    ({**SUPRA, "lora_alpha": 7, "init_weights": False}, "square"),
    ({**HALF, "select_top": False}, "wide"),
    ({**SUPRA, "save_precomputed_indices": False, "lora_dropout": 0.2}, "wide"),
    ({"target_modules": ["q_proj", "down_proj"]}, "llama"),
]
DEFINED = [(HALF, ELSEWHERE), (SUPRA, ELSEWHERE), ({**SUPRA, "lora_dropout": 0.2}, "wide_embedding")]
REFUSED = [
    (HALF, "wide_norm", "matrix"),
    ({}, "wide", "nearest valid: 0.9895"),
    ({**SUPRA, "lora_dropout": 0.1}, "wide_conv2d", "lora_dropout=0.1 on the input of A needs the activation form"),
    ({**SUPRA, "lora_dropout": 1.0}, "wide", "0 <= p < 1"),
]


def definition(W, b, tensors, options):
    new = W.clone().flatten()
    chosen = W.flatten().abs().argsort(descending=True)[: len(tensors["supertuning_values"])]
    assert set(chosen.tolist()) == set(tensors["supertuning_indices"].tolist())
    for value, index in zip(tensors["supertuning_values"], tensors["supertuning_indices"], strict=True):
        new[index] = new[index] + value
    new = new.reshape(W.shape)
    if "r" in options:
        A, B = tensors["supertuning_lora_A.weight"], tensors["supertuning_lora_B.weight"]
        new = new + options.get("lora_alpha", 2 * options["r"]) / options["r"] * (B @ A).reshape(W.shape)
    return new, b
