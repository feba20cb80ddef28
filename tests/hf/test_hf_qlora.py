"""QLoRA on SmolLM2-135M as transformers loads it: losses, files and tokens are PEFT's, the base takes a third of its memory."""

import gc

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peft_fx

pytestmark = pytest.mark.slow
STEPS, DENSE = 4, 538e6  # bytes of the float32 model, head and embedding being one
WAYS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def trained(library, way, ids, folder):
    """(losses of some steps, bytes of the base, tokens that follow) of a fresh model."""
    from tools.smollm2 import Unavailable, dense

    try:
        path = dense()
    except Unavailable as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=WAYS[way], dtype=torch.float32, device_map="cpu"
    )
    for module in model.modules():  # or PEFT's evaluation would round to bfloat16 on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    size = model.get_memory_footprint()
    model = library.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    config = library.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "gate_proj"], task_type="CAUSAL_LM")
    model = library.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for i in range(STEPS):
        part = ids[None, 32 * i : 32 * (i + 1)]
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokens = model.eval().generate(ids[None, :8], max_new_tokens=4, do_sample=False)
    return losses, size, tokens


@pytest.mark.parametrize("way", WAYS)
def test_qlora_is_pefts_to_the_bit(way, tmp_path):
    ids = torch.randint(0, 49152, (32 * STEPS,), generator=torch.Generator().manual_seed(0))
    found = {}
    for library in (peft, peft_fx):
        found[library] = trained(library, way, ids, tmp_path / library.__name__)
        gc.collect()
    (theirs, size, tokens), (mine, _, ours) = found[peft], found[peft_fx]
    assert mine == theirs and len(mine) == STEPS
    assert torch.equal(ours, tokens)
    assert size < (0.35 if way == "nf4" else 0.5) * DENSE
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "peft_fx")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
