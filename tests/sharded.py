"""Trains a tiny model with parameters sharded over the processes that torchrun starts, and saves the adapter.

    torchrun --nproc-per-node 2 sharded.py LIBRARY KIND FOLDER

`train` without a process group is the same on one process.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from graphs import inputs, model_of
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

NAME = "biased_llama"
CONFIG = dict(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], lora_dropout=0.0)


def fully_shard(model, optimiser):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module)
    fully_shard(model)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return model, optimiser(model), model, lambda: get_model_state_dict(model, options=whole)


def fsdp(model, optimiser):
    from peft_fx.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    policy = fsdp_auto_wrap_policy(model)
    around = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )

    def whole():
        # offload_to_cpu of tensors on a CPU is a segmentation fault of torch 2.13's
        config = FullStateDictConfig(offload_to_cpu=False)
        with FullyShardedDataParallel.state_dict_type(around, StateDictType.FULL_STATE_DICT, config):
            return around.state_dict()

    return around, optimiser(around), model, whole


def accelerate(model, optimiser):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    around, prepared = accelerator.prepare(model, optimiser(model))
    return around, prepared, accelerator.unwrap_model(around), lambda: accelerator.get_state_dict(around)


KINDS = {"fully_shard": fully_shard, "fsdp": fsdp, "accelerate": accelerate}


def train(library, kind, folder: Path) -> list[float]:
    """Losses; the adapter is saved in `folder`. kind: None for parameters that are whole."""

    def optimiser(model: nn.Module):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    torch.manual_seed(0)
    model = library.get_peft_model(model_of(NAME), library.LoraConfig(**CONFIG)).train()
    if kind is None:
        around, steps, inside, whole = model, optimiser(model), model, lambda: None
    else:
        around, steps, inside, whole = KINDS[kind](model, optimiser)
    given, losses = inputs(NAME), []
    for _ in range(4):
        loss = around(**given, labels=given["input_ids"]).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    state = whole()
    inside.save_pretrained(folder, state_dict=state, is_main_process=kind is None or dist.get_rank() == 0)
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    out = Path(sys.argv[3])
    found = train(importlib.import_module(sys.argv[1]), sys.argv[2], out)
    if dist.get_rank() == 0:
        (out / "losses.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of torch's end the interpreter's own way out with abort(), now and then
