"""PeftModel over packed layers, beside PEFT: outputs, gradients, merges, files, to the bit."""

import copy

import peft
import pytest
import torch
from packed_models import batch, llama

import peft_fx

CONFIG = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "init_lora_weights": False}


@pytest.fixture(scope="module", params=["nf4", "int8"])
def both(request):
    """(PEFT's, ours) with the same adapter; tests leave them as they were."""
    theirs = peft.get_peft_model(llama(request.param), peft.LoraConfig(**CONFIG))
    mine = peft_fx.get_peft_model(llama(request.param), peft_fx.LoraConfig(**CONFIG))
    peft_fx.set_peft_model_state_dict(mine, peft.get_peft_model_state_dict(theirs))
    return theirs, mine


def logits(model):
    return model(**batch()).logits


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients_are_those_of_peft(both, training):
    outputs, gradients = [], []
    for model in both:
        model.train(training).zero_grad()
        outputs.append(logits(model))
        outputs[-1].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert torch.equal(*outputs)
    assert len(gradients[0]) == len(gradients[1]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_without_adapters_the_packages_own_layers_run(both):
    theirs, mine = (model.eval() for model in both)
    with theirs.disable_adapter(), mine.disable_adapter():
        assert torch.equal(logits(theirs), logits(mine))


def test_a_merge_packs_again_as_peft_does_and_unmerge_changes_no_bit(both):
    theirs, mine = (model.train() for model in both)
    before, state = logits(mine), {n: t.clone() for n, t in mine.state_dict().items() if torch.is_tensor(t)}
    with pytest.warns(UserWarning, match="loses .* of what the adapters change"):
        mine.merge_adapter()
    copied = copy.deepcopy(theirs)  # whose unmerge does not give back what there was
    with pytest.warns(UserWarning, match="rounding"):
        copied.merge_adapter()
    # the sums may differ in their last bit, and with them the scales
    assert (logits(mine) - logits(copied)).abs().max() < 1e-6
    assert not torch.equal(logits(mine), before)
    mine.unmerge_adapter()
    assert torch.equal(logits(mine), before)
    assert all(torch.equal(t, state[n]) for n, t in mine.state_dict().items() if torch.is_tensor(t))


def test_merged_adapters_are_swapped_in_place(both, tmp_path):
    _, mine = both
    mine.train().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="packed"):
        mine.merge_adapter()
    merged = logits(mine)
    peft_fx.hotswap_adapter(mine, str(tmp_path), "default")
    assert torch.equal(logits(mine), merged)
    mine.unmerge_adapter()


def test_unloaded_models_keep_the_packages_layers_or_get_dense_ones(both):
    _, mine = both
    expected = logits(mine.eval())
    kinds = {}
    for storage in ("requantize", "dense"):
        model = copy.deepcopy(mine)
        if storage == "requantize":
            with pytest.warns(UserWarning, match="packed"):
                plain = model.merge_and_unload()
        else:
            plain = model.merge_and_unload(storage="dense")
            # in evaluation 8 bit layers round their inputs too, dense ones do not
            four = getattr(mine.base_model.model, "is_loaded_in_4bit", False)
            assert (logits(plain) - expected).abs().max() < (1e-5 if four else 0.02)
        kinds[storage] = type(plain.model.layers[0].self_attn.q_proj).__name__
    assert kinds["requantize"].startswith("Linear") and kinds["dense"] == "Linear"
    assert torch.equal(logits(mine), expected)


def test_an_unknown_storage_is_refused_and_nothing_is_merged(both):
    _, mine = both
    with pytest.raises(peft_fx.MergeError, match="expected 'requantize' or 'dense'"):
        mine.merge_and_unload(storage="int4")
    assert not mine.base_model.merged_adapters


def test_a_compiled_model_and_a_copy_compute_the_same(both, fresh_dynamo):
    _, mine = both
    expected = logits(mine.eval())
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**batch()).logits, expected)
    copied = copy.deepcopy(mine)
    assert torch.equal(logits(copied), expected)
    numbers = copied.base_model.model.model.layers[0].self_attn.q_proj.weight
    assert numbers.data_ptr() != mine.base_model.model.model.layers[0].self_attn.q_proj.weight.data_ptr()


def test_tokens_are_generated_as_by_peft(both):
    ids = batch()["input_ids"][:1, :4]
    tokens = [model.eval().generate(ids, max_new_tokens=6, do_sample=False) for model in both]
    assert torch.equal(*tokens)


def test_graphs_of_the_model_compute_the_same(both):
    _, mine = both
    expected = logits(mine.eval())
    assert torch.equal(mine.to_graph()(**batch()).logits, expected)


def test_evaluation_does_not_repack_weights():
    model = llama("nf4")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    shape = model.model.layers[0].self_attn.q_proj.weight.shape
    mine = peft_fx.get_peft_model(model, peft_fx.LoraConfig(**CONFIG)).eval()
    with mine.disable_adapter():
        logits(mine)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == shape
