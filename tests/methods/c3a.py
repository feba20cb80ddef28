"""C3A in PEFT: nn.Linear; its gradient with respect to the input has the kernel reversed, so that only a last target's is right."""

import torch

Q = {"block_size": 4}
PEFT = [
    (Q, "wide wide_without_bias square"),
    ({"block_size": 2, "init_weights": True}, "wide"),
    ({"block_size": 1, "init_weights": False}, "wide"),
    ({"block_size": 8, "init_weights": "gaussian"}, "square"),
    ({**Q, "init_weights": "kaiming_uniform"}, "wide"),
    ({**Q, "target_modules": ["up_proj"], "layers_to_transform": [1], "block_size_pattern": {"up_proj": 8}}, "llama"),
]
DEFINED = [
    (Q, "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated"),
    (Q, "wide_conv2d_grouped wide_conv3d wide_embedding"),
    ({"block_size": 3, "block_size_pattern": {"layer": 2}}, "wide"),
]
REFUSED = [
    (Q, "wide_norm", "matrix"),
    ({}, "wide", "block_size=256 .* nearest valid: 4"),
    ({"block_size": 3}, "wide", "nearest valid: 2"),
    ({**Q, "init_weights": "zeros"}, "wide", "expected one of"),
]


def definition(W, b, tensors, options):
    k = tensors["c3a_kernel"]
    A, E, q = k.shape
    blocks = [[torch.stack([k[a, e].roll(t) for t in range(q)]) for e in range(E)] for a in range(A)]
    update = torch.cat([torch.cat(row, 1) for row in blocks]) / (E * q)
    return W + update.reshape(W.shape), b
