"""LyCORIS's LoHa and LoKr files add to each weight what LyCORIS's formulas add."""

import pytest
import torch
from lora_files import Small, read

from peft_fx.planning.modules import module_table
from peft_fx.planning.plan import make_plan


def lycoris_file(kind, **options):
    """(model, file, deltas): what LyCORIS's formulas add to each weight."""
    model, tensors, deltas = Small(), {}, {}
    for name, module in model.named_children():
        out, features = module.weight.shape[:2]
        kernel = module.weight.shape[2:]
        made, deltas[name] = kind(out, features, kernel, **options)
        tensors |= {f"lora_unet_{name}.{k}": t for k, t in made.items()}
    return model, tensors, deltas


def loha(out, features, kernel, tucker=False):
    r, alpha = 2, 3.0
    if tucker and kernel:
        parts = {
            f"hada_{n}": torch.randn(s)
            for i in "12"
            for n, s in ((f"t{i}", (r, r, *kernel)), (f"w{i}_a", (r, out)), (f"w{i}_b", (r, features)))
        }
        P = [
            torch.einsum("ijkl,jn,im->mnkl", parts[f"hada_t{i}"], parts[f"hada_w{i}_b"], parts[f"hada_w{i}_a"])
            for i in "12"
        ]
    else:
        n = features * kernel.numel()
        parts = {f"hada_{k}": torch.randn(s) for i in "12" for k, s in ((f"w{i}_a", (out, r)), (f"w{i}_b", (r, n)))}
        P = [parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in "12"]
    return parts | {"alpha": torch.tensor(alpha)}, alpha / r * (P[0] * P[1]).reshape(out, features, *kernel)


def lokr(out, features, kernel, whole=False, both=False):
    r, alpha, l, c = 1, 2.0, 4, 4
    k, d = out // l, features // c
    w1 = {"lokr_w1_a": torch.randn(l, r), "lokr_w1_b": torch.randn(r, c)} if both else {"lokr_w1": torch.randn(l, c)}
    w2 = (
        {"lokr_w2": torch.randn(k, d, *kernel)}
        if whole
        else {"lokr_w2_a": torch.randn(k, r), "lokr_w2_b": torch.randn(r, d * kernel.numel())}
    )
    W1 = w1["lokr_w1_a"] @ w1["lokr_w1_b"] if both else w1["lokr_w1"]
    W2 = w2["lokr_w2"].reshape(k, -1) if whole else w2["lokr_w2_a"] @ w2["lokr_w2_b"]
    delta = torch.einsum("lc,kde->lkcde", W1, W2.reshape(k, d, -1)).reshape(out, features, *kernel)
    return w1 | w2 | {"alpha": torch.tensor(alpha)}, delta * (1 if whole else alpha / r)


@pytest.mark.parametrize("kind, options", [(loha, {}), (loha, {"tucker": True}), (lokr, {}), (lokr, {"both": True}), (lokr, {"whole": True})],
                         ids=["loha", "loha with cores", "lokr", "lokr of three factors", "lokr of whole factors"])  # fmt: skip
def test_lycoris_files_add_what_lycoris_adds(tmp_path, kind, options):
    torch.manual_seed(0)
    model, tensors, deltas = lycoris_file(kind, **options)
    config, found = read(tensors, module_table(model), tmp_path)
    for p in make_plan(module_table(model), "x", config).placements:
        theta = {name: found[p.file_key(name)] for name, _, _ in p.saved()} | {
            "scaling": torch.tensor(p.rule.scaling(p.target, p.config))
        }
        W = torch.zeros(p.target.shape)
        torch.testing.assert_close(p.rule.weight(W, None, theta, p.target, p.config)[0], deltas[p.target.path])
