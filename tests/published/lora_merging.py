"""Several adapters combined into one, by TIES and other ways, and merged into the model.

After huggingface/peft, examples/multi_adapter_examples/Lora_Merging.ipynb.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_fx import PeftConfig, PeftModel

config = PeftConfig.from_pretrained("adapters/english")
model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)
model.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(model, "adapters/english", adapter_name="english")
_ = model.load_adapter("adapters/portuguese", adapter_name="portuguese")
_ = model.load_adapter("adapters/sql", adapter_name="sql")

WAYS = {
    "ties": dict(weights=[2.0, 0.3, 0.7], density=0.2),
    "linear": dict(weights=[0.8, 0.1, 0.1]),
    "magnitude_prune": dict(weights=[1.0, 0.2, 0.5], density=0.7),
    "cat": dict(weights=[0.8, 0.5, 0.5]),
}
inputs = tokenizer("the red cat is", return_tensors="pt")
found = {}
for combination_type, options in WAYS.items():
    if "merge" in model.peft_config:
        model.delete_adapter("merge")
    model.add_weighted_adapter(
        ["english", "portuguese", "sql"], adapter_name="merge", combination_type=combination_type, **options
    )
    model.eval()
    model.set_adapter("merge")
    set_seed(1)
    sampled = model.generate(**inputs, max_new_tokens=6, do_sample=True, top_p=0.95, temperature=0.2, repetition_penalty=1.2,
                             eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    greedy = model.generate(**inputs, max_new_tokens=6, repetition_penalty=1.1, eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():
        logits = model(**inputs).logits
    found[combination_type] = {"sampled": sampled.tolist(), "greedy": greedy.tolist(), "logits": logits.tolist()}

model.save_pretrained("adapters_with_merge", selected_adapters=["merge"])
merged = model.merge_and_unload()
with torch.no_grad():
    found["merged"] = merged(**inputs).logits.tolist()

results = {"found": found, "kind": type(merged).__name__}
