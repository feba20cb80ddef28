"""Threads that call a PeftModel while another one changes it: every output is one state's, to the bit; nothing hangs.

PEFT_FX_CALLS: how many calls each reader makes; what the tests run is the small form.
"""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft_fx
from peft_fx import LoraConfig, get_peft_model
from peft_fx.engine import swapping

CALLS, READERS = int(os.environ.get("PEFT_FX_CALLS", "100")), 3
X = torch.linspace(-1, 1, 24).view(3, 8)
CONFIG = {"r": 2, "target_modules": ["first", "second", "last"], "init_lora_weights": False}


class Net(nn.Module):
    """Its parts are called in turn, so that a change between two calls would show."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        time.sleep(0)  # others may run
        return self.last(self.second(x).relu())


class Attends(Net):
    """One of its parts goes through Dynamo."""

    def __init__(self):
        super().__init__()
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.second(x, x, x, need_weights=False)[0])


def two(kind=Net, **options):
    """A model with adapters a, which acts, and b."""
    torch.manual_seed(0)
    model = get_peft_model(kind().eval(), LoraConfig(**CONFIG), "a")
    model.add_adapter("b", LoraConfig(**CONFIG))
    return model.eval().requires_grad_(False)


def files(model, folder):
    model.save_pretrained(folder)
    return folder / "a", folder / "b"


def call(model, **options):
    with torch.no_grad():
        return model(X, **options)


def by_setting(model, folder):
    return [lambda: model.set_adapter("a"), lambda: model.set_adapter("b")]


def by_disabling(model, folder):
    return [model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers]


def by_merging(model, folder):
    return [model.merge_adapter, model.unmerge_adapter]


def by_swapping(model, folder):
    one, other = files(model, folder)
    return [lambda: peft_fx.hotswap_adapter(model, one, "a"), lambda: peft_fx.hotswap_adapter(model, other, "a")]


def by_swapping_merged(model, folder):
    changes = by_swapping(model, folder)
    model.merge_adapter()
    return changes


def by_loading_and_deleting(model, folder):
    _, other = files(model, folder)

    def to_and_fro():
        model.load_adapter(other, "c")
        model.delete_adapter("c")

    return [to_and_fro]


def in_slots(make):
    def made(model, folder):
        model.reserve(slots=3)
        return make(model, folder)

    return made


CHANGES = {
    "set": by_setting,
    "disable": by_disabling,
    "merge": by_merging,
    "hotswap": by_swapping,
    "hotswap while merged": by_swapping_merged,
    "load and delete another": by_loading_and_deleting,
    "set in slots": in_slots(by_setting),
    "merge in slots": in_slots(by_merging),
    "load and delete in slots": in_slots(by_loading_and_deleting),
}


def load(reads, changes):
    """Each reader calls CALLS times while the changes go on in turn; every result is what the call gave after some change."""
    expected = []
    for change in changes:
        change()
        expected.append([read() for read in reads])
    over = threading.Event()

    def reader(i):
        for _ in range(CALLS):
            output = reads[i]()
            assert any(torch.equal(output, e[i]) for e in expected), "a mixture"

    def writer():
        n = 0
        while not over.is_set():
            changes[n % len(changes)]()
            n += 1
        return n

    with ThreadPoolExecutor(len(reads) + 1) as pool:
        writing = pool.submit(writer)
        reading = [pool.submit(reader, i) for i in range(len(reads))]
        try:
            for each in reading:
                each.result(timeout=600)
        finally:
            over.set()
        assert writing.result(timeout=60) > 3


@pytest.mark.parametrize("change", CHANGES)
def test_calls_while_it_changes_are_of_one_state_each(change, tmp_path):
    model = two()
    load([lambda: call(model)] * READERS, CHANGES[change](model, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["set", "disable", "merge", "hotswap"])
def test_so_are_calls_of_a_compiled_model(change, tmp_path):
    torch._dynamo.reset()
    model = two()
    compiled = torch.compile(model, backend="eager")
    load([lambda: call(compiled)] * READERS, CHANGES[change](model, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Net, Attends])
def test_rows_of_a_batch_keep_their_adapters_whatever_is_set(kind, tmp_path):
    model = two(kind)
    rows = [["a", "b", "__base__"], ["b", "b", "a"], ["__base__", "a", "b"]]
    reads = [lambda names=names: call(model, adapter_names=names) for names in rows]
    load(reads, by_setting(model, tmp_path))


def test_a_change_from_inside_a_call_is_refused_at_once():
    model = two()
    for change in (lambda: model.set_adapter("b"), model.merge_adapter, lambda: model.delete_adapter("b")):
        hook = model.get_base_model().second.register_forward_pre_hook(lambda *_, change=change: change())
        before = model.base_model.state
        with pytest.raises(peft_fx.GraphError, match="from inside a forward"):
            call(model)
        hook.remove()
        assert model.base_model.state is before and model.base_model.hosts.sharing.call() is None


def test_a_call_that_raises_leaves_the_model_free():
    model = two()
    hook = model.get_base_model().second.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(model)
    hook.remove()
    model.set_adapter("b")
    model.merge_adapter()
    model.unmerge_adapter()


def test_another_thread_may_go_on_while_a_call_runs_with_what_it_began_with():
    model = two()
    expected = call(model)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go_on.wait(60)

    model.get_base_model().second.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call, model)
        assert inside.wait(60)
        model.set_adapter("b", inference_mode=True)  # changes nothing in place, and does not wait
        go_on.set()
        assert torch.equal(running.result(timeout=60), expected)
    assert not torch.equal(call(model), expected)


FILES = ("peft_fx/hf/hosts/", "peft_fx/store/sharing.py")


def interrupted_at(step, run):
    """Runs it with a KeyboardInterrupt at the step-th call of the lock's and the hosts' code; False if it has not so many.

    Python hears of one as functions begin, and not between C's lock and what it guards.
    """
    left = [step]

    def trace(frame, event, _):
        if any(part in frame.f_code.co_filename for part in FILES):
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_call_that_is_interrupted_anywhere_leaves_the_model_free():
    model = two()
    expected, steps = call(model), 0
    sharing = model.base_model.hosts.sharing
    with ThreadPoolExecutor(1) as pool:
        while interrupted_at(steps + 1, lambda: call(model)):
            steps += 1
            assert sharing.call() is None and not sharing.writer_waits, f"after call {steps}"
            if not steps % 10:  # a writer goes on, and the number that it writes is the one that there was
                scale = next(iter(model.base_model.adapters.parameters()))
                pool.submit(sharing.put, {scale: scale.clone()}).result(timeout=60)
    assert steps > 10
    assert torch.equal(call(model), expected)


@pytest.mark.parametrize("where", ["before the numbers", "behind them"])
def test_an_interrupt_in_a_swap_is_heard_when_all_of_it_is_done(where, tmp_path, monkeypatch):
    """Numbers and config of one adapter, whichever: here the new one's."""
    model, other = two(), two()
    folder = files(other, tmp_path)[1]
    config, tensors = LoraConfig(**CONFIG, lora_alpha=5), load_file(folder / "adapter_model.safetensors")
    write = swapping.copy_all

    def pressed(writes):
        if where.startswith("before"):
            signal.raise_signal(signal.SIGINT)
        write(writes)
        if where.startswith("behind"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(swapping, "copy_all", pressed)
    with pytest.raises(KeyboardInterrupt):
        model.base_model.hotswap((config, tensors), "a")
    monkeypatch.undo()
    assert model.base_model.state.recipe["a"].config.lora_alpha == 5
    fresh = two()
    fresh.base_model.hotswap((config, tensors), "a")
    assert torch.equal(call(model), call(fresh)) and model.base_model.hosts.sharing.call() is None


def test_a_write_that_fails_on_the_way_is_taken_back(tmp_path, monkeypatch):
    model = two()
    expected = call(model)
    tensors = load_file(files(two(), tmp_path)[1] / "adapter_model.safetensors")

    def fails(tensors, values):
        for n, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
            if n == 3:
                monkeypatch.undo()
                raise RuntimeError("the device has gone")
            tensor.copy_(value)

    monkeypatch.setattr(torch, "_foreach_copy_", fails)
    with pytest.raises(RuntimeError, match="gone"):
        model.base_model.hotswap((LoraConfig(**CONFIG, lora_alpha=5), tensors), "a")
    assert torch.equal(call(model), expected) and model.base_model.state.recipe["a"].config.lora_alpha == 8
