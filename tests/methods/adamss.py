"""AdaMSS in PEFT: Linear. Its files hold A and B in pieces, one per cluster; tests/training/test_adamss.py looks at those."""

R = {"r": 4, "num_subspaces": 3}
TWO = {"r": 6, "num_subspaces": 2, "subspace_rank": 2}
PEFT = [
    (R, "wide wide_without_bias square"),
    ({**R, "random_seed": 5}, "wide"),
    ({}, "wide"),
    (TWO, "wide wide_without_bias"),
    ({"num_subspaces": 6, "subspace_rank": 3}, "wide"),
    ({**TWO, "subspace_rank": 4, "use_dynamic_rank": True, "svd_threshold": 0.4}, "wide"),
    ({**R, "init_weights": None}, "wide"),
    ({**R, "num_subspaces": 20}, "wide"),
    ({**TWO, "target_modules": ["q_proj", "down_proj"]}, "llama"),
]
OTHERS = (
    "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d "
    "wide_embedding"
)
DEFINED = [
    (R, OTHERS),
    ({**TWO, "use_dynamic_rank": True}, "wide_Conv1D wide_conv2d wide_embedding"),
]
REFUSED = [
    (R, "wide_norm", "rows of a matrix"),
    ({"subspace_rank": 0}, "wide", "from 1 to"),
    ({"init_weights": True}, "wide", "expected one of"),
    ({"use_asa": True, "init_warmup": 9, "final_warmup": 9}, "wide", "less than final_warmup=9"),
]


def definition(W, b, tensors, options):
    """Rows of one cluster share their A; `rows` and `components` say which cluster, and what of it there is."""
    import torch

    A, B, V = tensors["adamss_A"], tensors["adamss_B"], tensors["adamss_newB"]
    D = []
    for j in range(len(W)):
        (i,) = tensors["rows"][:, j].nonzero().flatten().tolist()
        r = int(tensors["components"][i].sum())
        D.append(B[j, :r] @ A[i, :r] @ V)
    D, n = torch.stack(D), W[0].numel()
    return W + D[:, :n].reshape(W.shape), None if b is None else b + D[:, n]
