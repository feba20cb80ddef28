"""Several adapters on one model, one at a time, and none.

After huggingface/peft, examples/multi_adapter_examples/PEFT_Multi_LoRA_Inference.ipynb.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from peft_fx import PeftModel

tokenizer = AutoTokenizer.from_pretrained("llama")
model = AutoModelForCausalLM.from_pretrained("llama")

model = PeftModel.from_pretrained(model, "adapters/english", adapter_name="english")
model.load_adapter("adapters/portuguese", adapter_name="portuguese")
print(model)
model.to("cpu")


def evaluate(instruction, temperature=0.1, top_p=0.75, top_k=40, num_beams=4, max_new_tokens=6, **options):
    input_ids = tokenizer(instruction, return_tensors="pt")["input_ids"]
    generation_config = GenerationConfig(
        temperature=temperature, top_p=top_p, top_k=top_k, num_beams=num_beams, no_repeat_ngram_size=3, **options
    )
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids,
            generation_config=generation_config,
            return_dict_in_generate=True,
            output_scores=True,
            max_new_tokens=max_new_tokens,
        )
    return {"tokens": output.sequences[0].tolist(), "scores": output.sequences_scores.tolist()}


answers = {"first": evaluate("the red cat is")}

model.set_adapter("english")
answers["english"] = evaluate("the red cat is")

model.set_adapter("portuguese")
answers["portuguese"] = evaluate("the red cat is")

with model.disable_adapter():
    answers["none"] = evaluate("the red cat is")

answers["after"] = evaluate("the red cat is")

results = {"answers": answers, "active": model.active_adapters, "configs": sorted(model.peft_config)}
