"""DEFT in PEFT: Linear, Conv1D."""

QR, PARA = {"r": 4, "decomposition_method": "qr"}, {"r": 4, "para": True}
PEFT = [
    ({"r": 4}, "wide wide_without_bias wide_Conv1D"),
    (QR, "wide wide_without_bias wide_Conv1D"),
    (PARA, "wide wide_Conv1D"),
    ({**QR, **PARA}, "wide_without_bias"),
    ({"r": 20, "alpha": 6}, "square"),
    ({"r": 4, "init_weights": False, "init_scale": 2.0}, "wide"),
    ({"r": 4, "target_modules": ["q_proj", "down_proj"]}, "llama"),
    ({"r": 4, "target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (
        {"r": 3, "alpha": 5},
        "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated wide_conv2d_grouped wide_conv3d wide_embedding",
    ),
    (QR, "wide_conv2d wide_conv2d_grouped wide_embedding"),
    (PARA, "wide_conv2d"),
]
REFUSED = [
    ({"r": 4}, "wide_norm", "matrix"),
    ({"r": 4, "deft_dropout": 1.0}, "wide", "deft_dropout"),
    ({"r": 4, "decomposition_method": "svd"}, "wide", "relu"),
]


def definition(W, b, tensors, options):
    import torch

    P, flat = tensors["deft_P"], W.flatten(1)
    Q = torch.linalg.qr(P)[0] if options.get("decomposition_method") == "qr" else P
    Z = Q if options.get("decomposition_method") == "qr" else P.clamp(min=0)
    new = (torch.eye(len(flat), dtype=W.dtype) - Q @ Z.T) @ flat
    if not options.get("para"):
        new = new + options.get("alpha", P.shape[1]) / P.shape[1] * Q @ tensors["deft_R"]
    return new.reshape(W.shape), b
