"""PEFT's model and ours with the same adapters."""

import peft
import torch
from graphs import inputs, model_of

import peft_fx

LORA = dict(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def both(folder, name="biased_llama", adapters=("default",), **config):
    """(PEFT's model, ours) with the same adapters."""
    reference = None
    for adapter in adapters:
        new = peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **config})
        if reference is None:
            reference = peft.get_peft_model(model_of(name), new, adapter)
        else:
            reference.add_adapter(adapter, new)
    with torch.no_grad():
        for n, p in reference.named_parameters():
            if "modules_to_save" in n:
                p.add_(0.1)
    reference.save_pretrained(folder)
    models = []
    for library in (peft, peft_fx):
        model = library.PeftModel.from_pretrained(model_of(name), folder, is_trainable=True)
        for adapter in adapters[1:]:
            model.load_adapter(folder / adapter, adapter)
        models.append(model.eval())
    return models


def logits(model):
    return model(**inputs("biased_llama")).logits
