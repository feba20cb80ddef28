"""PeftModel takes LoRA files of other programs where it takes PEFT's folders."""

import copy

import pytest
import torch
from diffusion import close, kohya, unet
from safetensors.torch import save_file

import peft_fx

diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import lora_conversion_utils as theirs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")


@pytest.mark.slow
def test_a_peft_model_is_made_from_a_file_and_takes_another(tmp_path):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = unet()
    model.eval()
    files, expected = [], []
    for i in range(2):
        tensors = kohya(model, "unet", ("conv1",))
        files.append(tmp_path / f"{i}.safetensors")
        save_file(tensors, files[-1])
        base = copy.deepcopy(model)
        converted, alphas = theirs._convert_non_diffusers_lora_to_diffusers(dict(tensors))
        base.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
        expected.append(base(**inputs).sample)
    tuned = peft_fx.PeftModel.from_pretrained(copy.deepcopy(model), files[0])
    close(tuned(**inputs).sample, expected[0])
    tuned.load_adapter(files[1], "other")
    tuned.set_adapter("other")
    close(tuned(**inputs).sample, expected[1])
    tuned.load_adapter(files[0], "other")
    close(tuned(**inputs).sample, expected[0])
    peft_fx.hotswap_adapter(tuned, files[1], "other")
    close(tuned(**inputs).sample, expected[1])
