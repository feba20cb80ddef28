"""The verbs beside PEFT's, both in this process, taking turns."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
from contenders import LORA, MODELS, seconds
from peft.utils.hotswap import hotswap_adapter

import peft_fx

ROUNDS = 7


@dataclass(frozen=True)
class Row:
    """The same work done by us and by PEFT. goal: the largest ratio that is good enough, None where there is none.

    after: what is done after either one, off the clock.
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    goal: float | None
    rounds: int = ROUNDS
    after: Callable[[], object] = lambda: None


def verb_rows(quick: bool) -> Iterator[tuple[str, list[float], list[float], float | None]]:
    """(name, our seconds, theirs, goal) per row, a round to warm up left out."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    name = "2 x 1024 Llama" if quick else "SmolLM2-135M"
    model = MODELS[name]()
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(model, Path(folder)):
            pairs = []
            for i in range(row.rounds + 1):
                order = (row.ours, row.theirs) if i % 2 else (row.theirs, row.ours)
                found = {}
                for work in order:
                    found[work] = seconds(work)
                    row.after()
                pairs.append((found[row.ours], found[row.theirs]))
            pairs = pairs[1:] or pairs
            yield f"{name}: {row.name}", [a for a, _ in pairs], [b for _, b in pairs], row.goal


def rows(model, folder: Path) -> Iterator[Row]:
    config = peft.LoraConfig(**LORA, init_lora_weights=False)
    spare = copy.deepcopy(model)
    start = time.perf_counter()
    graph = peft_fx.capture(model)
    captured = time.perf_counter() - start
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(folder)
    tuned = peft_fx.load_adapter(graph, folder, trainable=True)
    ids = torch.randint(0, 8192, (8, 32))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def trace():
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(theirs, backend="eager", dynamic=True)(**inputs, use_cache=False)

    traced = seconds(trace)
    yield Row("capture against Dynamo's tracing of the PEFT model", lambda: time.sleep(captured), lambda: time.sleep(traced),
              1.0, rounds=0)  # fmt: skip
    torch._dynamo.reset()
    yield Row("apply after capture", lambda: peft_fx.apply(graph, config),
              lambda: peft.get_peft_model(spare, config).unload(), 1.0)  # fmt: skip
    yield Row("swap of an adapter from its file", lambda: peft_fx.hotswap(tuned, folder),
              lambda: hotswap_adapter(theirs, str(folder), "default"), 0.33)  # fmt: skip
    slots = [p.detach() for n, p in tuned.named_parameters() if n.startswith("peft_fx.")]
    values = [t.clone() for t in slots]
    swap = peft_fx.prepare_swap(tuned, folder)
    yield Row("swap of an adapter in memory, against a copy of the bytes alone", lambda: peft_fx.hotswap(tuned, swap),
              lambda: [s.copy_(v) for s, v in zip(slots, values, strict=True)], 3.0)  # fmt: skip
    yield Row("merge", lambda: peft_fx.merge(tuned), theirs.merge_adapter, 1.0, after=theirs.unmerge_adapter)

    def cycle():
        theirs.merge_adapter()
        theirs.unmerge_adapter()

    yield Row("merge, then unmerge", lambda: peft_fx.unmerge(peft_fx.merge(tuned)), cycle, 1.0)
    yield from mixed(graph, theirs, folder, inputs)


def mixed(graph, theirs, folder: Path, inputs: dict) -> Iterator[Row]:
    """Eight adapters in eight rows. PEFT's is not compiled: SmolLM2's had not started to run after 25 minutes."""
    names = [f"a{i}" for i in range(8)]
    ours = graph
    for name in names:
        ours = peft_fx.load_adapter(ours, folder, name)
        theirs.load_adapter(folder, name)
    theirs.set_adapter(names[0])
    one, batch = peft_fx.set_adapter(ours, names[0]), peft_fx.mixed_batch(ours, names)
    fast_one, fast_batch = peft_fx.compile(one), peft_fx.compile(batch)

    def call(model, **more):
        with torch.no_grad():
            model(**inputs, **more)

    of_batch = partial(call, batch, adapter_ids=torch.arange(8))
    of_fast_batch = partial(call, fast_batch, adapter_ids=torch.arange(8))
    of_peft = partial(call, theirs, adapter_names=names, use_cache=False)
    yield Row("mixed batch of 8 adapters, both eager", of_batch, of_peft, None)
    yield Row("mixed batch of 8 adapters, ours compiled", of_fast_batch, of_peft, 0.80)
    yield Row("mixed batch of 8 adapters, against one adapter of ours, eager", of_batch, partial(call, one), None)
    yield Row("mixed batch of 8 adapters, against one adapter of ours", of_fast_batch, partial(call, fast_one), 1.10)
