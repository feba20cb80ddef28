"""Every method x its options x operator kind: against PEFT where it has the cell, against a float64 definition elsewhere."""

import conformance as c
import peft
import pytest
import torch
from torch.func import functional_call

import peft_fx as fx
from methods import MODULES, cells, label
from peft_fx.methods import INTERNAL, METHODS, get_method
from peft_fx.planning.kinds import module_targets
from peft_fx.planning.modules import module_table
from peft_fx.planning.plan import PREFIX
from peft_fx.store.state import state_of
from peft_fx.store.tensors import get_tensor

TOLERANCE = 1e-5
PEFT, DEFINED, REFUSED = cells("PEFT"), cells("DEFINED"), cells("REFUSED")
EXCLUSIVE = {name for name, module in MODULES.items() if getattr(module, "EXCLUSIVE", False)}


def every(cases):
    """All cells; in the quick run the first one of each method."""
    first = {cell[0]: i for i, cell in reversed(list(enumerate(cases)))}
    marked = [pytest.param(x, marks=() if first[x[0]] == i else pytest.mark.slow) for i, x in enumerate(cases)]
    return pytest.mark.parametrize("cell", marked, ids=[label(x) for x in cases])


def once(cases, part):
    """The first cell for each value of `part`, per method."""
    seen = {}
    for cell in cases:
        seen.setdefault((cell[0], part(cell)), cell)
    return list(seen.values())


def subjects(cases):
    return once(cases, lambda cell: cell[2])


def options(cases):
    return once(cases, lambda cell: str(cell[1]))


def merges(cell):
    return not get_method(cell[0]).no_weight


def ours(cell, folder):
    """A trainable adapter with random numbers from a file of our own."""
    _, options, subject, *_ = cell
    tuned = fx.apply(c.captured(subject), options)
    c.randomise(tuned)
    fx.save_adapter(tuned, folder)
    return tuned


def test_every_method_has_a_table():
    variants = {name for name, module in MODULES.items() if hasattr(module, "TYPE")}
    assert set(METHODS) - set(INTERNAL) - {"LORA"} == set(MODULES) - variants


# Against PEFT


@every(PEFT)
def test_peft_s_file_gives_its_outputs_gradients_and_merged_weights(cell, tmp_path):
    _, options, subject = cell
    theirs = c.peft_model(subject, options)
    folder = c.save_peft(theirs, tmp_path)
    tuned = fx.load_adapter(c.captured(subject), folder, trainable=True)
    expected = c.run(theirs, subject)
    assert c.error(c.run(tuned, subject), expected) <= TOLERANCE
    ours_grad = c.gradients(tuned, subject, lambda f: fx.save_adapter(tuned, f))
    theirs_grad = c.gradients(theirs, subject, lambda f: c.save_peft(theirs, f))
    copies = getattr(MODULES[cell[0]], "COPIES", ())
    theirs_grad = {k: t for k, t in theirs_grad.items() if not (k.startswith(PREFIX) and k.endswith(copies))}
    frozen = [k for k in theirs_grad if not any(k == n for n in ours_grad)]
    assert not frozen, f"keys of PEFT's file that we do not write: {frozen}"
    trained = {k for k, t in theirs_grad.items() if t.is_floating_point()}
    assert c.error({k: ours_grad[k] for k in trained}, {k: theirs_grad[k] for k in trained}) <= TOLERANCE
    if not merges(cell):
        return
    merged = fx.merge(tuned)
    assert c.error(c.run(merged, subject), c.run(c.quiet(theirs.merge_and_unload), subject)) <= TOLERANCE
    assert c.error(c.run(merged, subject), expected) <= TOLERANCE


@every(PEFT)
def test_peft_loads_our_file_and_gives_our_outputs(cell, tmp_path):
    _, _, subject = cell
    tuned = ours(cell, tmp_path)
    theirs = c.quiet(peft.PeftModel.from_pretrained, c.build(subject), tmp_path).eval()
    assert c.error(c.run(theirs, subject), c.run(tuned, subject)) <= TOLERANCE


@every(options(PEFT))
def test_an_untrained_adapter_is_the_identity_where_peft_s_is(cell):
    _, options, subject = cell
    theirs = c.quiet(peft.get_peft_model, c.build(subject), c.peft_config(options)).eval()
    base = c.run(c.build(subject), subject)
    at_start = c.run(fx.apply(c.captured(subject), options), subject)
    assert (c.error(c.run(theirs, subject), base) <= 1e-5) == (c.error(at_start, base) <= 1e-5)


# Against the definition


@every(DEFINED)
def test_outputs_gradients_and_merged_weights_are_the_definition_s(cell, tmp_path):
    name, options, subject = cell
    tuned = ours(cell, tmp_path)
    model = c.build(subject).double().requires_grad_(False)
    record = module_table(model)["layer"]
    (target,) = module_targets(record)
    (placement,) = [p for p in state_of(tuned).recipe["default"].placements if p.method not in ("SAVED",)]
    tensors = {}
    for tensor, spec in placement.tensors.items():
        key = spec.key or tensor
        value = get_tensor(tuned, f"peft_fx.adapters.{placement.resolve(tensor).name}").detach()
        tensors[key] = value.double().requires_grad_(spec.trainable) if value.is_floating_point() else value
    W, b = model.layer.weight, getattr(model.layer, "bias", None)
    new_W, new_b = MODULES[name].definition(W.mT if target.transposed else W, b, tensors, options)
    if new_W.shape != target.shape:  # an update that crosses groups
        model.layer.groups = 1
    weights = {"layer.weight": new_W.mT if target.transposed else new_W}
    if new_b is not None:
        weights["layer.bias"] = new_b
        if b is None:
            model.layer.bias = torch.nn.Parameter(torch.zeros_like(new_b))
    output = c.floats(functional_call(model, weights, kwargs=c.inputs(subject, torch.float64)))
    trained = {k: t for k, t in tensors.items() if t.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(c.loss(output), list(trained.values())), strict=True))
    assert c.error(c.run(tuned, subject), [t.detach() for t in output]) <= TOLERANCE
    c.loss(c.floats(tuned(**c.inputs(subject)))).backward()
    found = {
        spec.key or tensor: get_tensor(tuned, f"peft_fx.adapters.{placement.resolve(tensor).name}").grad
        for tensor, spec in placement.tensors.items()
        if spec.trainable
    }
    assert c.error(found, gradients) <= TOLERANCE
    assert c.error(c.run(fx.merge(tuned), subject), [t.detach() for t in output]) <= TOLERANCE


@every([x for x in once(PEFT, lambda cell: cell[0]) if merges(x)])
def test_a_bf16_base_loses_no_more_by_merging_than_with_peft(cell, tmp_path):
    _, options, subject = cell
    theirs = c.peft_model(subject, options, torch.bfloat16)
    folder = c.save_peft(theirs, tmp_path)
    tuned = fx.load_adapter(c.captured(subject, torch.bfloat16), folder)
    ours = c.rms_error(c.run(fx.merge(tuned), subject, torch.bfloat16), c.run(tuned, subject, torch.bfloat16))
    before = c.run(theirs, subject, torch.bfloat16)
    merged = c.run(c.quiet(theirs.merge_and_unload), subject, torch.bfloat16)
    assert ours <= 1.25 * c.rms_error(merged, before)  # single roundings fall either way on a few numbers


# Everywhere


@every(subjects(filter(merges, PEFT + DEFINED)))
def test_merge_then_unmerge_changes_no_bit(cell, tmp_path):
    tuned = ours(cell, tmp_path)
    back = fx.unmerge(fx.merge(tuned))
    before, after = tuned.state_dict(), back.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(a, b) for a, b in zip(c.run(back, cell[2]), c.run(tuned, cell[2]), strict=True))


@every([cell for cell in options(PEFT + DEFINED) if not merges(cell)])
def test_what_no_weight_stands_for_is_not_merged_and_adds_up(cell, tmp_path):
    name, _, subject = cell
    tuned = ours(cell, tmp_path)
    with pytest.raises(fx.MergeError, match=f"{name} cannot be merged: {get_method(name).no_weight}"):
        fx.merge(tuned)
    theirs = c.quiet(peft.PeftModel.from_pretrained, c.build(subject), tmp_path).eval()
    c.quiet(theirs.load_adapter, tmp_path, "second")
    theirs.base_model.set_adapter(["default", "second"])
    both = fx.set_adapter(fx.load_adapter(tuned, tmp_path, "second"), ["default", "second"])
    assert c.error(c.run(both, subject), c.run(theirs, subject)) <= TOLERANCE


@every(once([cell for cell in PEFT + DEFINED if cell[0] in EXCLUSIVE], lambda cell: len(c.SUBJECTS[cell[2]].inputs())))
def test_only_one_adapter_that_brings_its_own_numbers_can_be_active(cell, tmp_path):
    tuned = ours(cell, tmp_path)
    with pytest.raises(fx.RecipeError, match="only one can be active"):
        fx.set_adapter(fx.load_adapter(tuned, tmp_path, "second"), ["second", "default"])


@every(
    once(
        [cell for cell in PEFT + DEFINED if cell[0] not in EXCLUSIVE and merges(cell)],
        lambda cell: len(c.SUBJECTS[cell[2]].inputs()),
    )
)
def test_two_active_adapters_equal_their_merge_in_that_order(cell, tmp_path):
    _, _, subject = cell
    tuned = ours(cell, tmp_path)
    both = fx.load_adapter(tuned, tmp_path, "second", trainable=True)
    c.randomise(both, seed=9)
    both = fx.set_adapter(both, ["second", "default"])
    assert c.error(c.run(fx.merge(both), subject), c.run(both, subject)) <= TOLERANCE


@pytest.mark.parametrize("order", (["default", "lora"], ["lora", "default"]), ids=" then ".join)
@every([x for x in PEFT + DEFINED if x[0] in ("BOFT", "HRA", "OFT", "ROAD") and x[2] in ("wide", "wide_conv2d")][::3])
def test_a_lora_beside_another_method_equals_their_merge_in_that_order(cell, order, tmp_path):
    _, _, subject = cell
    lora = fx.apply(c.captured(subject), {"peft_type": "LORA", "r": 2, "target_modules": ["layer"]})
    c.randomise(lora)
    fx.save_adapter(lora, tmp_path / "lora")
    both = fx.set_adapter(fx.load_adapter(ours(cell, tmp_path / "own"), tmp_path / "lora", "lora"), order)
    assert c.error(c.run(fx.merge(both), subject), c.run(both, subject)) <= TOLERANCE


@every([cell for name in MODULES for cell in [x for x in PEFT + DEFINED if x[0] == name][:2]])
def test_it_compiles_as_one_graph_in_training_and_inference_and_exports(cell, tmp_path):
    _, _, subject = cell
    tuned = ours(cell, tmp_path)
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    expected = c.run(tuned, subject)
    assert c.error(c.run(compiled, subject), expected) <= TOLERANCE
    c.loss(c.floats(compiled(**c.inputs(subject)))).backward()
    program = fx.export(tuned, tmp_path / "graph.pt2")
    assert c.error(c.run(program.module(), subject), expected) <= TOLERANCE
    assert c.error(c.run(fx.load(tmp_path / "graph.pt2"), subject), expected) <= TOLERANCE
    assert c.error(c.run(torch.export.export(tuned, (), c.inputs(subject)).module(), subject), expected) <= TOLERANCE


@every([next(x for x in PEFT + DEFINED if x[0] == name) for name in MODULES])
def test_hotswap_equals_a_fresh_load_and_recompiles_nothing(cell, tmp_path):
    _, _, subject = cell
    tuned = ours(cell, tmp_path / "a")
    other = fx.apply(c.captured(subject), cell[1])
    c.randomise(other, seed=11)
    fx.save_adapter(other, tmp_path / "b")
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    c.run(compiled, subject)
    with torch.compiler.set_stance("fail_on_recompile"):
        fx.hotswap(compiled, tmp_path / "b")
        swapped = c.run(compiled, subject)
    assert c.error(swapped, c.run(other, subject)) <= 1e-6


@every(REFUSED)
def test_what_has_no_meaning_is_refused_with_the_reason(cell):
    _, options, subject, reason = cell
    with pytest.raises(fx.RecipeError, match=reason):
        fx.apply(c.captured(subject), options)
