"""FourierFT in PEFT: Linear, Conv1D. Positions are not in the file: the definition draws them itself."""

import torch

F = {"n_frequency": 20, "scaling": 40.0}
PEFT = [
    (F, "wide wide_without_bias square wide_Conv1D"),
    ({"n_frequency": 96, "random_loc_seed": 5, "init_weights": True}, "wide"),
    ({**F, "target_modules": ["q_proj", "up_proj"], "n_frequency_pattern": {"up_proj": 7}}, "llama"),
    ({**F, "target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (F, "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated"),
    (F, "wide_conv2d_grouped wide_conv3d wide_embedding"),
    ({**F, "n_frequency_pattern": {"layer": 9}}, "wide"),
]
REFUSED = [
    (F, "wide_norm", "matrices"),
    ({}, "wide", "n_frequency=1000 .* nearest valid: 96"),
    ({"n_frequency": 0}, "wide", "positive"),
]


def definition(W, b, tensors, options):
    m, n = W.shape[0], W[0].numel()
    values, update = tensors["fourierft_spectrum"], 0
    seed = options.get("random_loc_seed", 777)
    where = torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))[: len(values)].tolist()
    rows, columns = torch.arange(m).double(), torch.arange(n).double()
    for value, p in zip(values, where, strict=True):
        angle = 2 * torch.pi * (p // n * rows[:, None] / m + p % n * columns / n)
        update = update + value * torch.cos(angle)
    return W + options["scaling"] / (m * n) * update.reshape(W.shape), b
