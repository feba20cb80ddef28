"""PSOFT in PEFT: Linear."""

R = {"r": 4, "psoft_alpha": 8}
NEUMANN = {**R, "use_cayley_neumann": True}
PEFT = [
    (R, "wide wide_without_bias square"),
    ({**R, "ab_svd_init": "pissa_init"}, "wide"),
    ({**R, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 3, "random_seed": 5}, "wide"),
    ({**R, "psoft_orth": False}, "wide"),
    ({**R, "psoft_mag_a": False}, "wide"),
    ({**R, "psoft_mag_b": False}, "wide"),
    (NEUMANN, "wide"),
    ({**NEUMANN, "num_cayley_neumann_terms": 2, "cayley_neumann_eps": 0.3}, "wide"),
    ({**NEUMANN, "num_cayley_neumann_terms": 3}, "wide"),
    ({**R, "init_weights": False}, "wide"),
    ({**R, "target_modules": ["q_proj", "down_proj"]}, "llama"),
]
OTHERS = "wide_Conv1D wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv3d wide_embedding"
DEFINED = [
    (R, f"{OTHERS} wide_conv2d_grouped"),
    ({**R, "psoft_dropout": 0.3}, "wide_Conv1D wide_conv2d wide_conv2d_grouped"),
    ({**R, "psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False}, "wide_Conv1D wide_conv2d wide_embedding"),
]
REFUSED = [
    (R, "wide_norm", "1-d"),
    ({"r": 9}, "wide", "r=9 exceeds the rank of a matrix of 12 x 8; nearest valid: 8"),
    ({"r": 1}, "wide", "nearest valid: 2"),
    ({**NEUMANN, "num_cayley_neumann_terms": 1}, "wide", "expected 2 or more"),
    ({**R, "ab_svd_init": "svd"}, "wide", "expected one of"),
]


def definition(W, b, tensors, options):
    import torch

    flat, r = W.flatten(1), options["r"]
    U, S, V = torch.linalg.svd(flat, full_matrices=False)
    principal = (U[:, :r] * S[:r]) @ V[:r]
    # the directions' signs are free: those of the adapter's A
    A = tensors["subspace"][:, : flat.shape[1]]
    signs = (A * V[:r]).sum(1).sign()
    eye = torch.eye(r, dtype=W.dtype)
    R = tensors["psoft_R.weight"]
    if options.get("psoft_orth", True):
        Q, k = torch.zeros(r, r, dtype=W.dtype), 0
        for i in range(r):
            for j in range(i + 1, r):
                unit = torch.zeros(r, r, dtype=W.dtype)
                unit[i, j], unit[j, i] = 1, -1
                Q, k = Q + R[k] * unit, k + 1
        R = (eye + Q) @ torch.linalg.inv(eye - Q)
    for name, axis in (("psoft_R.vector_b", 1), ("psoft_R.vector_a", 0)):
        if name in tensors:
            R = R * tensors[name].unsqueeze(axis)
    turned = (U[:, :r] * S[:r] * signs) @ R @ (signs[:, None] * V[:r])
    return (flat - principal + turned).reshape(W.shape), b
