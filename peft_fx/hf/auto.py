"""`AutoPeftModelFor...`: the base model that an adapter's files name, with the adapter."""

from __future__ import annotations

import transformers

from ..errors import AdapterFileError
from ..files.read import file_in, local_folder, read_config
from .model import DEFAULT, PeftModel
from .types import TaskType


class AutoPeftModel:
    """Base model by the class that the files record, for adapters without a task_type."""

    task_type: TaskType | None = None
    auto_class: str | None = None

    def __init__(self, *args, **kwargs):
        raise OSError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, adapter_name: str = DEFAULT, is_trainable: bool = False,
                        config=None, revision: str | None = None, **kwargs) -> PeftModel:  # fmt: skip
        """kwargs go to the base model's `from_pretrained`. Raises AdapterFileError where the files name no base model."""
        folder = local_folder(pretrained_model_name_or_path)
        config = read_config(folder) if config is None else config
        if not config.base_model_name_or_path:
            raise AdapterFileError(f"{folder}: adapter_config.json has no base_model_name_or_path: load the model, and "
                                   "PeftModel.from_pretrained(model, folder)")  # fmt: skip
        if cls.task_type is not None and config.task_type != cls.task_type:
            raise ValueError(
                f"Expected target PEFT task type: {cls.task_type.value}, but {folder} has {config.task_type}: take the "
                "class for that task, or AutoPeftModel"
            )
        base = cls.base_class(config).from_pretrained(
            config.base_model_name_or_path, revision=revision or "main", **kwargs
        )
        if file_in(folder, "tokenizer_config.json") is not None and hasattr(base, "resize_token_embeddings"):
            vocabulary = len(transformers.AutoTokenizer.from_pretrained(folder))
            if vocabulary > base.get_input_embeddings().num_embeddings:
                base.resize_token_embeddings(vocabulary)
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable, config)

    @classmethod
    def base_class(cls, config):
        """transformers' class that loads the base model."""
        name = cls.auto_class or (config.auto_mapping or {}).get("base_model_class")
        if name is None:
            raise AdapterFileError(
                "the adapter records neither a task_type nor its base's class (auto_mapping): load the model, and "
                "PeftModel.from_pretrained(model, folder)"
            )
        found = getattr(transformers, str(name), None)
        if cls.auto_class is None and not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise AdapterFileError(
                f"base_model_class={name!r} is no model class of transformers: load the model yourself"
            )
        return found


class AutoPeftModelForCausalLM(AutoPeftModel):
    task_type, auto_class = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task_type, auto_class = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task_type, auto_class = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task_type, auto_class = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task_type, auto_class = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task_type, auto_class = TaskType.FEATURE_EXTRACTION, "AutoModel"
