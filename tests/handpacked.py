"""Weights of few bits packed by hand, bit by bit in numpy, each with the dense weight in float64 that its format defines.

name(out, in, ..., seed) -> Hand(tensors by the checkpoint's names, facts of our format, W)
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Hand:
    scheme: str
    tensors: dict  # in the scheme's order
    facts: dict
    W: torch.Tensor  # (out, in) float64
    dtype: torch.dtype


def stream(codes, bits):
    """(rows, n) -> (rows, n * bits / 32) int32: the bits of all codes, lowest first, one after the other."""
    single = (codes[..., None] >> np.arange(bits)) & 1
    return torch.from_numpy(
        np.packbits(single.reshape(len(codes), -1).astype(np.uint8), 1, "little").view(np.int32).copy()
    )


def cut(codes, bits):
    """(rows, n) -> (rows, words) int32: 32 // bits codes in a word, the rest of its bits unused."""
    count = 32 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % count))).reshape(len(codes), -1, count)
    single = np.zeros((*codes.shape[:2], 32), np.uint8)
    single[..., : count * bits] = ((codes[..., None] >> np.arange(bits)) & 1).reshape(*codes.shape[:2], -1)
    return torch.from_numpy(np.packbits(single.reshape(len(codes), -1), 1, "little").view(np.int32).copy())


def drawn(seed):
    return np.random.default_rng(seed)


def scales(rng, *shape):
    return (rng.random(shape) * 0.02 + 0.005).astype(np.float16)


def gptq(out, inp, *, bits=4, group=32, version=1, order=False, seed=0):
    """Zero points from 1 on, which both versions can store."""
    rng, groups = drawn(seed), inp // group
    q, z = rng.integers(0, 2**bits, (out, inp)), rng.integers(1, 2**bits, (out, groups))
    s, g = scales(rng, out, groups), np.arange(inp) // group
    if order:
        g = rng.permutation(g)
    tensors = {
        "qweight": stream(q, bits).t().contiguous(),
        "qzeros": stream((z - (version == 1)).T, bits),
        "scales": torch.from_numpy(s.T.copy()),
        "g_idx": torch.from_numpy(g.astype(np.int32)),
    }
    plus = "none" if version == 2 else "wrap" if bits == 3 else "carry"
    W = (q - z[:, g]) * s.astype(np.float64)[:, g]
    return Hand("gptq", tensors, {"bits": bits, "plus": plus}, torch.from_numpy(W), torch.float16)


def awq(out, inp, *, bits=4, group=32, seed=0):
    rng, groups = drawn(seed), inp // group
    q, z, s = rng.integers(0, 2**bits, (out, inp)), rng.integers(0, 2**bits, (out, groups)), scales(rng, out, groups)
    order = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else range(8)

    def columns(codes):
        return stream(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(len(codes), -1), bits)

    tensors = {"qweight": columns(q.T), "qzeros": columns(z.T), "scales": torch.from_numpy(s.T.copy())}
    W = (q - z.repeat(group, 1)) * s.astype(np.float64).repeat(group, 1)
    return Hand("awq", tensors, {"bits": bits}, torch.from_numpy(W), torch.float16)


def hqq(out, inp, *, bits=4, group=32, axis=1, dtype=torch.float32, seed=0):
    rng, count = drawn(seed), out * inp // group
    rows, columns = (count, group) if axis == 1 else (group, count)
    q = rng.integers(0, 2**bits, (rows, columns))
    sides = (rows, 1) if axis == 1 else (1, columns)
    s = torch.from_numpy(scales(rng, *sides)).to(dtype)
    z = torch.from_numpy(rng.random(sides) * (2**bits - 1)).to(dtype)
    strips = 10 if bits == 3 else 8 // bits
    padded = np.pad(q, ((0, -rows % strips), (0, 0))).reshape(strips, -1, columns)
    words = sum(padded[i] << bits * (strips - 1 - i) for i in range(strips))
    W_q = torch.from_numpy(words).to(torch.int32 if bits == 3 else torch.uint8)
    W = ((torch.from_numpy(q) - z.double()) * s.double()).reshape(out, inp)
    return Hand("hqq", {"W_q": W_q, "scale": s, "zero": z}, {"bits": bits, "top": 2**bits - 1}, W, dtype)


def eetq(out, inp, *, seed=0):
    rng = drawn(seed)
    q, s = rng.integers(-128, 128, (inp, out)).astype(np.int8), scales(rng, out)
    q[0] = -128  # the scale is that of the largest element
    sixteen = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    a = q.reshape(inp // 16, 16, out)[:, sixteen].reshape(inp, out).T
    a = a.reshape(out // 2, 2, inp // 64, 64).transpose(0, 2, 1, 3).reshape(-1, 4)[:, [0, 2, 1, 3]]
    words = (a.astype(np.int16) + 128).astype(np.uint8).view(np.int8).reshape(inp, out)
    tensors = {"weight": torch.from_numpy(words.copy()), "weight_scales": torch.from_numpy(s)}
    return Hand("eetq", tensors, {}, torch.from_numpy(q.T * s.astype(np.float64)[:, None]), torch.float16)


def aqlm(out, inp, *, bits=8, codebooks=2, tile=(1, 8), dtype=torch.float32, seed=0):
    rng, shape = drawn(seed), (out // tile[0], inp // tile[1], codebooks)
    q = rng.integers(0, 2**bits, shape)
    books = torch.from_numpy(rng.standard_normal((codebooks, 2**bits, *tile)) * 0.05).to(dtype)
    s = torch.from_numpy(rng.random((shape[0], 1, 1, 1)) + 0.5).to(dtype)
    W = torch.zeros(out, inp, dtype=torch.float64)
    for o in range(shape[0]):
        for i in range(shape[1]):
            entry = sum(books[c, q[o, i, c]].double() for c in range(codebooks)) * s[o, 0, 0, 0].double()
            W[o * tile[0] : (o + 1) * tile[0], i * tile[1] : (i + 1) * tile[1]] = entry
    codes = torch.from_numpy(np.where(q >= 2 ** (bits - 1), q - 2**bits, q)).to(
        torch.int8 if bits <= 8 else torch.int16
    )
    return Hand("aqlm", {"codes": codes, "codebooks": books, "scales": s}, {}, W, dtype)


def inc(out, inp, *, bits=4, group=32, type="int", optimum=True, zeros=True, order=False, seed=0):
    """type: "int", or the name of a table of floats that is written out here."""
    rng, groups = drawn(seed), inp // group
    s, g = scales(rng, out, groups), np.arange(inp) // group
    if order:
        g = rng.permutation(g)
    facts = {"type": type, "bits": bits, "optimum": optimum}
    tail = {"g_idx": torch.from_numpy(g.astype(np.int32))}
    if type != "int":
        entries = FLOATS[type]
        q = rng.choice(list(entries), (out, inp))
        q[:, ::group] = max(entries, key=entries.get)  # the scale is that of the largest element of a group
        s = s.astype(np.float32)
        W = np.vectorize(entries.get)(q).astype(np.float32).astype(np.float64) * s.astype(np.float64)[:, g]
        code = torch.tensor([entries.get(i, entries.get(i - 16, 0.0)) for i in range(16)])
        tensors = {"qweight": cut(q & 15, 4), "scales": torch.from_numpy(s), **tail, "code": code}
        return Hand("inc", tensors, facts, torch.from_numpy(W), torch.float32)
    half = 2 ** (bits - 1)
    q = rng.integers(0, 2**bits, (out, inp)) if zeros else rng.integers(-half, half, (out, inp))
    z = rng.integers(0, 2**bits, (out, groups)) if zeros else np.zeros((out, groups), int)
    if bits == 8 and zeros:  # the package takes differences in 8 bits: those that fit
        z[:] = half
    W = (q - z[:, g]) * s.astype(np.float64)[:, g]
    words, sides = cut(q & (2**bits - 1), bits), torch.from_numpy(s)
    tensors = {
        "qweight": words.t().contiguous() if optimum else words,
        "scales": sides.t().contiguous() if optimum else sides,
        **tail,
    }
    if zeros:
        tensors["qzeros"] = cut((z.T - 1) & (2**bits - 1), bits) if optimum else cut(z, bits)
    return Hand("inc", tensors, facts, torch.from_numpy(W), torch.float16)


# code -> entry, by the lists of the package's utility.py
FLOATS = {
    "nf4": dict(zip((7, 1, 2, 3, 4, 5, 6, 0, -8, -7, -6, -5, -4, -3, -2, -1), (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0), strict=True)),
    "fp4": dict(zip((-5, -6, -3, -4, -1, -2, -7, 0, 1, 6, 7, 4, 5, 2, 3),
                    (-12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -0.0625, 0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0), strict=True)),
    "fp4_e2m1": dict(zip((-1, -2, -3, -4, -5, -6, -7, 0, 1, 2, 3, 4, 5, 6, 7), (
        -1.0, -2 / 3, -0.5, -1 / 3, -0.25, -1 / 6, -1 / 96, 0.0, 1 / 96, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0), strict=True)),
}  # fmt: skip


def inc8(out, inp, *, seed=0):
    rng = drawn(seed)
    words = torch.from_numpy(rng.standard_normal((inp, out)) * 50).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.0025)
    facts = {"input": 0.03125, "type": "float8_e4m3fn"}
    return Hand("inc8", {"weight": words, "scale": scale}, facts, (words.double() * scale.double()).t(), torch.bfloat16)


CASES = {
    **{f"gptq {b} bits v{v}{' in any order' * o}": lambda *n, b=b, v=v, o=o, **k: gptq(*n, bits=b, version=v, order=o, **k)
       for b in (2, 3, 4, 8) for v, o in ((1, False), (2, True))},
    **{f"awq {b} bits": lambda *n, b=b, **k: awq(*n, bits=b, **k) for b in (2, 3, 4, 8)},
    **{f"hqq {b} bits axis {a}": lambda *n, b=b, a=a, **k: hqq(*n, bits=b, axis=a, **k) for b in (8, 4, 3, 2, 1) for a in (0, 1)},
    "hqq in float16": lambda *n, **k: hqq(*n, dtype=torch.float16, **k),
    "eetq": eetq,
    **{f"aqlm {c}x{b} {t}": lambda *n, c=c, b=b, t=t, **k: aqlm(*n, codebooks=c, bits=b, tile=t, **k)
       for c, b, t in ((1, 16, (1, 8)), (2, 8, (1, 8)), (4, 5, (2, 4)))},
    **{f"inc {b} bits": lambda *n, b=b, **k: inc(*n, bits=b, **k) for b in (2, 3, 4, 8)},
    "inc in any order": lambda *n, **k: inc(*n, order=True, **k),
    "inc along inputs": lambda *n, **k: inc(*n, optimum=False, **k),
    "inc with signs": lambda *n, **k: inc(*n, optimum=False, zeros=False, **k),
    **{f"inc {t}": lambda *n, t=t, **k: inc(*n, type=t, optimum=False, zeros=False, **k) for t in FLOATS},
    "inc8": inc8,
}  # fmt: skip
