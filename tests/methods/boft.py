"""BOFT in PEFT: Linear, Conv2d (square kernels, no dilation, no groups); one butterfly factor without its CUDA extension."""

BLOCKS = {"boft_block_size": 4}
BUTTERFLY = {"boft_block_size": 2, "boft_n_butterfly_factor": 2}
PEFT = [
    (BLOCKS, "wide wide_without_bias square wide_conv2d wide_conv2d_pointwise"),
    ({"boft_block_size": 0, "boft_block_num": 4}, "wide wide_conv2d"),
    ({**BLOCKS, "init_weights": False}, "wide"),
    ({**BLOCKS, "target_modules": ["q_proj", "down_proj"]}, "llama"),
]
DEFINED = [
    (BLOCKS, "wide_Conv1D wide_conv1d wide_conv2d_dilated wide_conv2d_grouped wide_conv3d"),
    (BUTTERFLY, "wide wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_grouped wide_conv3d"),
    ({**BUTTERFLY, "boft_n_butterfly_factor": 3}, "wide wide_conv2d wide_conv2d_pointwise"),
    ({**BLOCKS, "boft_n_butterfly_factor": 3}, "wide_conv2d wide_conv3d"),
    ({**BUTTERFLY, "boft_dropout": 0.5}, "wide wide_Conv1D wide_conv2d"),
]
REFUSED = [
    (BLOCKS, "wide_embedding", "token ids"),
    (BLOCKS, "wide_norm", "1-d"),
    ({"boft_block_size": 3}, "wide", "boft_block_size=3 does not divide 8 input features; nearest valid: 2"),
    ({**BLOCKS, "boft_n_butterfly_factor": 3}, "wide", "boft_n_butterfly_factor=3 needs .* nearest valid: 2"),
    ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "wide_conv1d", "nearest valid: 1"),
    ({**BLOCKS, "boft_dropout": 1.0}, "wide", "expected 0 <= p < 1"),
    ({**BLOCKS, "boft_n_butterfly_factor": 0}, "wide", "expected an integer from 1"),
    ({**BLOCKS, "boft_block_num": 2}, "wide", "one has to be positive"),
]


def definition(W, b, tensors, options):
    import torch

    R, s, flat = tensors["boft_R"], tensors["boft_s"].flatten(), W.flatten(1)
    N, D, c, _ = R.shape
    n, eye = D * c, torch.eye(c, dtype=W.dtype)
    product = torch.eye(n, dtype=W.dtype)
    for i in range(N):
        S = [(r - r.T) / 2 for r in R[i]]
        block_diagonal = torch.block_diag(*[(eye - q) @ torch.linalg.inv(eye + q) for q in S])
        P, size, chunk = torch.eye(n, dtype=W.dtype), c * 2**i, c // 2
        if i:
            chunks = [*range(0, size // chunk, 2), *range(1, size // chunk, 2)]
            order = [g + k * chunk + t for g in range(0, n, size) for k in chunks for t in range(chunk)]
            P = P[order]
        product = P @ block_diagonal @ P.T @ product
    return (s[:, None] * (flat @ product.T)).reshape(W.shape), b
