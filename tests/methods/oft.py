"""OFT in PEFT: Linear, Conv2d (right on pointwise kernels only), Embedding."""

BLOCKS = {"oft_block_size": 4}
EXACT = {**BLOCKS, "use_cayley_neumann": False}
COFT = {**BLOCKS, "coft": True, "eps": 0.3}
PEFT = [
    (BLOCKS, "wide wide_without_bias square wide_embedding wide_conv2d_pointwise"),
    (EXACT, "wide wide_embedding wide_conv2d_pointwise"),
    ({**BLOCKS, "num_cayley_neumann_terms": 2}, "wide"),
    ({**BLOCKS, "num_cayley_neumann_terms": 3}, "wide"),
    ({**BLOCKS, "num_cayley_neumann_terms": 7}, "wide"),
    ({"r": 4, "oft_block_size": 0}, "wide wide_embedding"),
    ({"oft_block_size": 3}, "wide"),
    ({"oft_block_size": 32}, "wide wide_embedding"),
    (COFT, "wide wide_embedding"),
    ({**COFT, "use_cayley_neumann": False, "block_share": True}, "wide"),
    ({**BLOCKS, "block_share": True}, "wide wide_embedding"),
    ({**BLOCKS, "init_weights": False}, "wide"),
    ({**BLOCKS, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}, "llama"),
]
CONVOLUTIONS = "wide_conv1d wide_conv2d wide_conv2d_dilated wide_conv2d_grouped wide_conv3d"
DEFINED = [
    (EXACT, f"wide_Conv1D {CONVOLUTIONS}"),
    ({**COFT, "block_share": True}, "wide_Conv1D wide_conv2d"),
    (BLOCKS, "wide_Conv1D wide_conv2d"),
    ({**BLOCKS, "module_dropout": 0.4}, "wide wide_Conv1D wide_conv2d"),
]
REFUSED = [
    (BLOCKS, "wide_norm", "1-d"),
    ({"oft_block_size": 1}, "wide", "blocks of one feature cannot rotate"),
    ({**BLOCKS, "num_cayley_neumann_terms": 1}, "wide", "expected 2 or more"),
    ({"oft_block_size": 4, "r": 2}, "wide", "one has to be positive"),
    ({**BLOCKS, "module_dropout": 1.0}, "wide", "expected 0 <= p < 1"),
]


def definition(W, b, tensors, options):
    import torch

    v, flat = next(t for k, t in tensors.items() if k.endswith("R.weight")), W.flatten(1)
    c, n = options["oft_block_size"], flat.shape[1]
    blocks, eye = [], torch.eye(c, dtype=W.dtype)
    for d in range(n // c):
        row = v[0 if options.get("block_share") else d]
        Q = torch.zeros(c, c, dtype=W.dtype)
        for k, (i, j) in enumerate(torch.triu_indices(c, c, 1).T.tolist()):
            unit = torch.zeros(c, c, dtype=W.dtype)
            unit[i, j], unit[j, i] = 1, -1
            Q = Q + row[k] * unit
        if options.get("coft"):
            radius = options["eps"] / len(v) ** 0.5
            factor = (radius / Q.square().sum().sqrt()).clamp(max=1).detach()
            Q = Q + (factor * Q - Q).detach()
        if options.get("use_cayley_neumann", True):
            blocks.append(eye + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q)
        else:
            blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
    return (flat @ torch.block_diag(*blocks).T).reshape(W.shape), b
