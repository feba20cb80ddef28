"""One contender of the benchmark in a process of its own: it does what bench.py asks for, one line of JSON at a time.

{"do": "inference", "batch": 1, "length": 64}  ->  {"seconds": 0.031}
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from smollm2 import load
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fx

LORA = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}


def small(layers: int = 2, width: int = 1024):
    """A Llama of few, wide layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                         num_attention_heads=width // 64, num_key_value_heads=width // 128, vocab_size=8192)  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS: dict[str, Callable] = {"SmolLM2-135M": lambda: load()[0], "2 x 1024 Llama": small}


def pack(model) -> None:
    """nf4 with double quantization, as QLoRA; computed in float32, in canonical layout on any processor."""
    import bitsandbytes

    for path, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and path != "lm_head":
            new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                             compute_dtype=torch.float32, quant_type="nf4")  # fmt: skip
            new.load_state_dict(layer.state_dict())
            new = new.to("cpu").requires_grad_(False).train(layer.training)
            new.support_avx512bf16_for_cpu = False
            model.set_submodule(path, new)
    model.is_loaded_in_4bit = True


COMPILERS: dict[str | None, Callable] = {
    None: lambda model: model,
    "torch": lambda model: torch.compile(model, dynamic=True),
    "peft_fx": peft_fx.compile,
}


class Contender:
    """A model, bare or adapted by either library. compiler: of COMPILERS; config: the adapter's, if it is not LoRA's; packed:
    linear layers but the head are bitsandbytes' nf4."""

    def __init__(self, library: str, compiler: str | None, model: str, layers: int | None = None, dtype: str = "float32",
                 config: dict | None = None, packed: bool = False):  # fmt: skip
        torch.manual_seed(0)
        self.compiler = compiler
        self.base = small(layers, 256) if layers else MODELS[model]()
        self.base = self.base.to(getattr(torch, dtype)).requires_grad_(False)
        if packed:
            pack(self.base)
        self.config = config or {"peft_type": "LORA", **LORA}
        self.captured = 0.0
        start = time.perf_counter()
        self.model = getattr(self, library)()
        self.made = time.perf_counter() - start
        self.compiled_model = self.model

    def bare(self):
        """With one small parameter to train, ahead of everything: a step goes back through all that an adapted one does."""
        self.base.model.layers[0].input_layernorm.weight.requires_grad_(True)
        return self.capture() if self.compiler == "peft_fx" else self.base

    def peft(self):
        return self.wrapped(peft)

    def face(self):
        return self.wrapped(peft_fx)

    def wrapped(self, library):
        options = dict(self.config)
        kind = library.PEFT_TYPE_TO_CONFIG_MAPPING[options.pop("peft_type")]
        return library.get_peft_model(self.base, kind(**options)).eval()

    def peft_fx(self):
        return peft_fx.apply(self.capture(), self.config)

    def capture(self):
        start = time.perf_counter()
        graph = peft_fx.capture(self.base)
        self.captured = time.perf_counter() - start
        return graph

    def compile(self):
        """Done for inference and for training apart, so that each cold start is its own."""
        torch._dynamo.reset()
        self.compiled_model = COMPILERS[self.compiler](self.model)

    def ids(self, batch: int, length: int) -> dict:
        ids = torch.randint(0, 8192, (batch, length))
        more = {} if self.captured else {"use_cache": False}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}

    def inference(self, batch: int = 1, length: int = 64) -> None:
        with torch.no_grad():
            self.compiled_model(**self.ids(batch, length))

    def generate(self, batch: int = 1, length: int = 32, tokens: int = 16) -> None:
        inputs = self.ids(batch, length)
        self.model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)  # fmt: skip

    def training(self, batch: int = 2, length: int = 64) -> None:
        inputs = self.ids(batch, length)
        logits = self.compiled_model(**inputs).logits.float()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()).backward()
        for parameter in self.model.parameters():
            parameter.grad = None


def peak(work: Callable[[], object]) -> float:
    """Bytes by which the process grew at most while working, counted from when it has given back what it does not use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    warnings.simplefilter("ignore")
    contender = Contender(**json.loads(sys.argv[1]))
    answer({"captured": contender.captured, "made": contender.made})
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        work = lambda: getattr(contender, what)(**asked)  # noqa: B023, E731
        answer({"bytes": peak(work)} if asked.pop("peak", False) else {"seconds": seconds(work)})


def answer(data: dict) -> None:
    print("bench:" + json.dumps(data), flush=True)


if __name__ == "__main__":
    main()
