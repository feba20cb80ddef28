"""The Hugging Face face on families whose calls differ: encoders, speech, pictures, experts, heads, what export cannot capture."""

import copy

import peft
import pytest
import torch
import transformers as hf
from layered import mixtral, vit, whisper

import peft_fx

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]

SMALL = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
LORA = dict(r=4, lora_alpha=32, init_lora_weights=False)


def ids(length=7):
    return torch.randint(1, 30, (2, length))


def llava():
    text = hf.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0)
    vision = hf.CLIPVisionConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=8, patch_size=4)
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=39, vision_feature_layer=-1,
                            vision_feature_select_strategy="default")  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def picture_and_text():
    tokens = torch.tensor([[1, 39, 39, 39, 39, 5, 6]])
    return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=torch.randn(1, 3, 8, 8))


def deberta():
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(
        **SMALL, max_position_embeddings=32, relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=3))  # fmt: skip


def distilbert():
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(
        vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32, num_labels=3))  # fmt: skip


MODELS = {
    "distilbert": (distilbert, lambda: {"input_ids": ids(), "labels": torch.tensor([0, 2])},
                   {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"]}),
    "whisper": (whisper, lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids(4)}, {}),
    "llava": (llava, picture_and_text, {"task_type": "CAUSAL_LM", "target_modules": r".*language_model.*(q_proj|v_proj)"}),
    "deberta": (deberta, lambda: {"input_ids": ids(), "labels": torch.tensor([0, 2])},
                {"task_type": "SEQ_CLS", "target_modules": ["query_proj", "value_proj"]}),
    "mixtral": (mixtral, lambda: {"input_ids": ids()},
                {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 3, 8, 8)}, {}),
    "questions": (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SMALL)),
                  lambda: {"input_ids": ids(), "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
                  {"task_type": "QUESTION_ANS", "target_modules": ["query", "value"]}),
    "tokens": (lambda: hf.BertForTokenClassification(hf.BertConfig(**SMALL, num_labels=3)),
               lambda: {"input_ids": ids(), "labels": torch.randint(0, 3, (2, 7))},
               {"task_type": "TOKEN_CLS", "target_modules": ["query", "value"]}),
}  # fmt: skip


def pair(make, folder, **config):
    torch.manual_seed(0)
    base = make().eval()
    config = {**LORA, "target_modules": "all-linear", **config}
    reference = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
    reference.save_pretrained(folder)
    return reference, peft_fx.PeftModel.from_pretrained(base, folder)


def numbers(output):
    return [t for t in (getattr(output, n, None) for n in ("loss", "logits", "last_hidden_state", "start_logits")) if t is not None]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_pefts(name, tmp_path):
    make, inputs, config = MODELS[name]
    reference, model = pair(make, tmp_path, **config)
    x = inputs()
    with torch.no_grad():
        found, expected = numbers(model(**x)), numbers(reference(**x))
        with reference.disable_adapter():
            bare = numbers(reference(**x))
    assert found and len(found) == len(expected)
    for ours, theirs, without in zip(found, expected, bare, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.equal(theirs, without)


@pytest.mark.parametrize("name", ["whisper", "llava"])
def test_generated_tokens_are_pefts(name, tmp_path):
    make, inputs, config = MODELS[name]
    reference, model = pair(make, tmp_path, **config)
    x = {k: v for k, v in inputs().items() if k != "decoder_input_ids"}
    wanted, found = (m.generate(**x, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (reference, model))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["deberta", "distilbert", "questions", "tokens"])
def test_heads_train_as_in_peft(name, tmp_path):
    make, inputs, config = MODELS[name]
    torch.manual_seed(0)
    base, x, losses = make(), inputs(), []
    for library in (peft, peft_fx):
        torch.manual_seed(1)
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**{**config, "r": 4, "lora_alpha": 32}))
        loaded = tmp_path / "start"
        if library is peft:
            model.save_pretrained(loaded)
        else:
            model = peft_fx.PeftModel.from_pretrained(copy.deepcopy(base), loaded, is_trainable=True)
        model.eval()  # no dropout: the draws would differ
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            loss = model(**x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], abs=1e-5) and losses[3] < losses[0]
