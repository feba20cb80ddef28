"""WaveFT in PEFT: Linear, Conv1D. The definition builds the inverse transform of every coefficient from its filters."""

import torch

from peft_fx.methods.wavelets import FILTERS

F = {"n_frequency": 20}
BOTH = {**F, "proportional_parameters": True, "target_modules": ["q_proj", "up_proj"]}
PEFT = [
    (F, "wide wide_without_bias square wide_Conv1D"),
    ({**F, "wavelet_family": "db3", "scaling": 3.0, "random_loc_seed": 5}, "wide wide_Conv1D"),
    ({**F, "wavelet_family": "sym2", "init_weights": False}, "wide"),
    ({**F, "wavelet_family": "coif1"}, "square"),
    ({"n_frequency": 96, "use_idwt": False}, "wide"),
    *[({**F, "wavelet_family": f"db{i}"}, "linear") for i in range(1, 11)],
    *[({**F, "wavelet_family": f"sym{i}"}, "linear") for i in range(2, 11)],
    *[({**F, "wavelet_family": f"coif{i}"}, "linear") for i in range(1, 5)],
    ({**F, "target_modules": ["q_proj", "up_proj"], "n_frequency_pattern": {"up_proj": 7}}, "llama"),
    (BOTH, "llama"),
    ({**F, "target_modules": ["c_attn"]}, "gpt2"),
]
DEFINED = [
    (F, "wide_conv1d wide_conv2d wide_conv2d_pointwise wide_conv2d_dilated"),
    (F, "wide_conv2d_grouped wide_conv3d wide_embedding"),
    ({**F, "wavelet_family": "coif1"}, "wide_conv1d"),
    ({**F, "wavelet_family": "coif5"}, "wide"),  # PEFT's numbers give an empty update
]
REFUSED = [
    (F, "wide_norm", "matrices"),
    ({}, "wide", "n_frequency=2592 .* nearest valid: 96"),
    ({**F, "wavelet_family": "db11"}, "wide", "expected one of .'db1', "),
    ({"n_frequency": 97, "proportional_parameters": True}, "wide", "share of n_frequency=97"),
]
LOW = {
    "db1": [2**-0.5, 2**-0.5],
    # coif1 in closed form
    "coif1": [(1 - 7**0.5) * 2**0.5 / 32, (5 + 7**0.5) * 2**0.5 / 32, (14 + 2 * 7**0.5) * 2**0.5 / 32,
              (14 - 2 * 7**0.5) * 2**0.5 / 32, (1 - 7**0.5) * 2**0.5 / 32, (-3 + 7**0.5) * 2**0.5 / 32],
    "coif5": FILTERS["coif5"],
}  # fmt: skip


def check_coiflet(low, order):
    """Orthogonal to its even shifts, and with the vanishing moments that make it the coiflet."""
    h, centre = torch.tensor(low, dtype=torch.float64), 2 * order
    for shift in range(0, len(h), 2):
        assert abs((h[shift:] * h[: len(h) - shift]).sum() - float(shift == 0)) < 1e-7
    t = torch.arange(len(h)).double() - centre
    for moment in range(2 * order):
        wanted = 2**0.5 if moment == 0 else 0.0
        powers = (t / order) ** moment
        assert abs((h * (-1) ** torch.arange(len(h)) * powers).sum()) < 1e-6
        assert abs((h * powers).sum() - wanted) < 1e-6


def atoms(size, low):
    """Row k: what the k-th coefficient of a padded signal becomes; (filter, coefficient, size)."""
    L = len(low)
    high = [(-1) ** i * low[L - 1 - i] for i in range(L)]
    padded = size + L - 2 + (size + L) % 2
    found = torch.zeros(2, padded // 2, size, dtype=torch.float64)
    for f, values in enumerate((low, high)):
        for k in range(padded // 2):
            for j, value in enumerate(values):
                if 0 <= (at := 2 * k + j - (L - 2)) < size:
                    found[f, k, at] = value
    return found, (padded - size) // 2, padded // 2


def definition(W, b, tensors, options):
    m, n = W.shape[0], W[0].numel()
    low = LOW[family := options.get("wavelet_family", "db1")]
    if family.startswith("coif"):
        check_coiflet(low, int(family[4:]))
    (rows, first_row, half_m), (columns, first_column, half_n) = atoms(m, low), atoms(n, low)
    values, update = tensors["waveft_spectrum"], 0
    where = torch.randperm(m * n, generator=torch.Generator().manual_seed(777))[: len(values)].tolist()
    for value, p in zip(values, where, strict=True):
        (i, r), (j, s) = divmod(p // n + first_row, half_m), divmod(p % n + first_column, half_n)
        update = update + value * torch.outer(rows[j, r], columns[i, s])
    return W + 25 * update.reshape(W.shape), b
