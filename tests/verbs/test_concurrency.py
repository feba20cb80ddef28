"""Swaps and switches under load: every output of another thread is one adapter's, to the bit."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import conformance as c
import pytest
import torch
from marks import quick

import peft_fx as fx
from peft_fx.store.sharing import Sharing

CONFIG = {"peft_type": "LORA", "r": 2, "init_lora_weights": False, "target_modules": "all-linear"}
READERS, SWAPS = 4, 200


def folders(tmp_path, configs=(CONFIG, CONFIG)):
    found = []
    for i, config in enumerate(configs):
        tuned = fx.apply(c.captured("llama"), config)
        c.randomise(tuned, i)
        found.append(fx.save_adapter(tuned, tmp_path / str(i)))
    return found


def under_load(call, change, choices, readers=READERS, swaps=SWAPS):
    """`change(choice)` in turn, so many times, while so many readers run `call`; every result is the one of some choice."""
    expected = []
    for choice in choices:
        change(choice)
        expected.append(call())
    assert not torch.equal(*expected)
    over, seen = threading.Event(), [set() for _ in range(readers)]

    def read(found):
        while not over.is_set():
            output = call()
            fits = [i for i, e in enumerate(expected) if torch.equal(output, e)]
            assert fits, "a mixture of two adapters"
            found.update(fits)

    with ThreadPoolExecutor(readers) as pool:
        reading = [pool.submit(read, found) for found in seen]
        try:
            for i in range(swaps):
                change(choices[i % len(choices)])
        finally:
            over.set()
        for reader in reading:
            reader.result()
    assert set().union(*seen) == set(range(len(choices)))


def caller(model):
    inputs = c.inputs("llama")

    def call():
        with torch.no_grad():
            return model(**inputs).logits

    return call


# torch 2.13 counts the frames that `fullgraph=True` asks for in one number for all threads: now and then a call of several
# at once "found no compiled frames" (pytorch/pytorch#185138)
FORMS = {
    "eager": lambda graph: graph,
    "blocks compiled": lambda graph: fx.compile(graph, backend="aot_eager"),
    "torch.compile": lambda graph: torch.compile(graph, backend="aot_eager"),
    "a deep copy": copy.deepcopy,
}


def forms(*names):
    """The first one is in the quick run."""
    return pytest.mark.parametrize("form", quick(names, names[0]), ids=names)


@forms(*FORMS)
def test_swaps_under_load(form, tmp_path):
    a, b = folders(tmp_path)
    model = FORMS[form](fx.load_adapter(c.captured("llama"), a))
    under_load(caller(model), lambda folder: fx.hotswap(model, folder), [a, b])


@forms("eager", "torch.compile")
def test_switches_under_load(form, tmp_path):
    a, b = folders(tmp_path)
    both = fx.load_adapter(fx.load_adapter(c.captured("llama"), a, "a"), b, "b")
    model = FORMS[form](fx.reserve(both, slots=2))
    under_load(caller(model), lambda names: fx.switch(model, names), ["a", "b"])


@pytest.mark.slow
@forms("eager", "blocks compiled")
def test_merged_swaps_under_load(form, tmp_path):
    a, b = folders(
        tmp_path, (CONFIG, {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ["q_proj", "down_proj"]})
    )
    model = FORMS[form](fx.merge(fx.load_adapter(c.captured("llama"), a)))
    under_load(caller(model), lambda folder: fx.hotswap(model, folder), [a, b])


@pytest.mark.slow
def test_a_swap_of_a_graph_waits_for_the_forwards_of_those_derived_from_it(tmp_path):
    a, b = folders(tmp_path)
    graph = fx.load_adapter(c.captured("llama"), a)
    under_load(caller(fx.set_adapter(graph, "default")), lambda folder: fx.hotswap(graph, folder), [a, b])


@pytest.mark.slow
def test_a_graph_inside_a_compiled_function_is_guarded_by_its_caller(tmp_path):
    a, b = folders(tmp_path)
    graph = fx.load_adapter(c.captured("llama"), a)
    compiled = torch.compile(lambda **kwargs: graph(**kwargs).logits * 2, backend="aot_eager")
    inputs = c.inputs("llama")

    def call():
        with torch.no_grad(), graph.peft_fx.sharing.forward():
            return compiled(**inputs)

    under_load(call, lambda folder: fx.hotswap(graph, folder), [a, b])


def test_a_failing_forward_lets_swaps_pass(tmp_path):
    a, b = folders(tmp_path)
    graph = fx.load_adapter(c.captured("llama"), a)
    for wrong, error in (({"input_ids": torch.ones(2, 2, 2, dtype=torch.int64)}, Exception), ({}, Exception)):
        with pytest.raises(error):
            graph(**wrong)
    fx.hotswap(graph, b)
    assert graph.peft_fx.sharing.call() is None


def test_a_forward_inside_a_forward_passes_a_swap_that_waits(tmp_path):
    a, b = folders(tmp_path)
    graph = fx.load_adapter(c.captured("llama"), a)
    sharing, call = graph.peft_fx.sharing, caller(graph)
    before = call()
    with ThreadPoolExecutor(1) as pool:
        with sharing.forward():
            swap = pool.submit(fx.hotswap, graph, b)
            while not sharing.writer_waits:
                time.sleep(0.001)
            assert torch.equal(call(), before)
            assert not swap.done()
            with pytest.raises(fx.GraphError, match="from inside a forward"):
                fx.hotswap(graph, a)
        swap.result(timeout=60)
    assert not torch.equal(call(), before)


def test_a_failing_write_lets_forwards_pass():
    sharing = Sharing()
    with pytest.raises(ZeroDivisionError), sharing.swapping(), sharing.writing([torch.ones(1)]):
        1 / 0  # noqa: B018
    with sharing.forward():
        assert sharing.call() is not None
    with sharing.swapping(), sharing.writing([]):
        assert sharing.call() is None and sharing.writer_waits
    assert not sharing.writer_waits and not sharing.running


def test_a_swap_between_forward_and_backward_makes_backward_raise(tmp_path):
    a, b = folders(tmp_path)
    graph = fx.load_adapter(c.captured("llama"), a, trainable=True)
    loss = graph(**c.inputs("llama")).logits.sum()
    fx.hotswap(graph, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


READS = {
    "save": lambda graph, folder: fx.load_adapter(c.captured("llama"), fx.save_adapter(graph, folder)),
    "merge": lambda graph, folder: fx.merge(graph),
    "a deep copy": lambda graph, folder: copy.deepcopy(graph),
}


@pytest.mark.slow
@pytest.mark.parametrize("read", READS)
def test_what_is_read_under_swaps_is_one_adapter(read, tmp_path):
    """Its numbers and its scale: one has twice the other's."""
    a, b = folders(tmp_path, (CONFIG, {**CONFIG, "lora_alpha": 32}))
    graph, count = fx.load_adapter(c.captured("llama"), a), iter(range(10**6))
    inputs = c.inputs("llama")

    def call():
        with torch.no_grad():
            return READS[read](graph, tmp_path / f"copy{next(count)}")(**inputs).logits

    under_load(call, lambda folder: fx.hotswap(graph, folder), [a, b], readers=2, swaps=30)
