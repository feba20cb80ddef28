"""Threads that call a PeftModel while another one changes it: every output is one state's, to the bit; nothing hangs.

PEFT_FX_CALLS: how many calls each reader makes; what the tests run is the small form.
"""

import _thread
import contextlib
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft_fx
from peft_fx import LoraConfig, get_peft_model
from peft_fx.engine.transitions import names_of
from peft_fx.store.state import state_of

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


def by_capturing(model, folder):
    return [lambda: model.to_graph((X,))]


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
    "capture": by_capturing,
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


@contextlib.contextmanager
def interrupts(seconds):
    """Ctrl-C at random moments of the main thread, for so long."""
    over, armed = threading.Event(), [True]

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    def press():
        draw = random.Random(0)
        while not over.wait(draw.random() * 0.004):
            _thread.interrupt_main(signal.SIGINT)

    before, thread = signal.signal(signal.SIGINT, interrupt), threading.Thread(target=press)
    timer = threading.Timer(seconds, over.set)
    thread.start()
    timer.start()
    try:
        yield over
    finally:
        while armed:
            with contextlib.suppress(KeyboardInterrupt):
                armed.clear()
        over.set()
        thread.join()
        timer.join()
        signal.signal(signal.SIGINT, before)


def adapters(folder):
    """Those of two files, in memory: an interrupt inside of safetensors' code leaves that damaged."""
    return [(LoraConfig(**CONFIG), load_file(each / "adapter_model.safetensors")) for each in files(two(), folder)]


def on_the_face(tmp_path):
    model, (one, other) = two(), adapters(tmp_path)
    steps = [
        lambda: call(model),
        lambda: model.set_adapter("b"),
        lambda: model.set_adapter("a"),
        lambda: model.base_model.hotswap(one, "a"),
        lambda: model.base_model.hotswap(other, "a"),
        model.merge_adapter,
        model.unmerge_adapter,
    ]
    return lambda: call(model), lambda: model.base_model.state, model.base_model.hosts.sharing, steps


def on_a_graph(tmp_path):
    one, other = adapters(tmp_path)
    graph = peft_fx.apply(peft_fx.capture(two().get_base_model(), (X,)), one[0], "a")
    steps = [lambda: graph(X), lambda: peft_fx.hotswap(graph, one, "a"), lambda: peft_fx.hotswap(graph, other, "a")]
    return lambda: graph(X), lambda: state_of(graph), graph.peft_fx.sharing, steps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", [on_the_face, on_a_graph])
def test_an_interrupt_anywhere_leaves_everything_free_and_whole(made, tmp_path):
    run, state, sharing, steps = made(tmp_path)
    pressed = 0
    with interrupts(3) as over:
        draw = random.Random(1)
        while not over.is_set():
            try:
                draw.choice(steps)()
            except KeyboardInterrupt:
                pressed += 1
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(0.05)  # the last one may be on its way
    assert pressed > 20
    assert sharing.call() is None and not sharing.writer_waits
    with ThreadPoolExecutor(1) as pool:
        for step in steps:  # from another thread too
            pool.submit(step).result(timeout=60)
    names_of(state(), "a")
    assert torch.equal(run(), run())
