"""diffusers' models, tiny, with inputs for one call; and kohya-ss's files for them."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"))  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
    }
    return model, inputs


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=6, axes_dims_rope=(4, 4, 8))  # fmt: skip
    ids = torch.zeros(6, 3)
    ids[:, 1], ids[:, 2] = torch.arange(6) // 3, torch.arange(6) % 3
    inputs = {"hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 5, 8), "timestep": torch.tensor([0.3, 0.9]),
              "pooled_projections": torch.randn(2, 6), "img_ids": ids, "txt_ids": torch.zeros(5, 3)}  # fmt: skip
    return model, inputs


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def kohya(model, name, convolutions, alpha=2.0):
    """A file of kohya-ss's for a UNet or a Flux transformer, with the names of Flux's own code."""
    tensors = {}

    def add(key, features, out, *kernel):
        A, B = torch.randn(4, features, *kernel) / 4, torch.randn(out, 4, *(1 for _ in kernel)) / 4
        tensors.update({f"lora_unet_{key}.lora_down.weight": A, f"lora_unet_{key}.lora_up.weight": B,
                        f"lora_unet_{key}.alpha": torch.tensor(alpha)})  # fmt: skip

    if name == "unet":
        for path, module in model.named_modules():
            if path.endswith(("to_q", "to_k", "to_out.0", *convolutions)):
                add(
                    path.replace(".", "_"),
                    module.weight.shape[1],
                    *(module.weight.shape[i] for i in range(module.weight.dim()) if i != 1),
                )
    else:
        add("double_blocks_0_img_attn_qkv", 32, 96)
        add("double_blocks_0_txt_attn_proj", 32, 32)
        add("double_blocks_0_img_mod_lin", 32, 192)
    return tensors
