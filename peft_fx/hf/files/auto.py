"""`AutoPeftModelFor...`: the base model that an adapter's files name, with the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from ...atomic import StrPath
from ...config import AdapterConfig
from ...errors import AdapterFileError
from ...files.read import file_in, local_folder, read_config
from ...peft_types import TaskType
from ..compat.constants import TOKENIZER_CONFIG_NAME
from ..model.model import PeftModel
from ..model.tuner import DEFAULT

ALLOWED = ("diffusers", "transformers")
HUB = ("cache_dir", "force_download", "local_files_only", "token")  # arguments of the Hub's that base and adapter share


class Loader(Protocol):
    """A class of models, or of transformers' auto classes."""

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """The model of a folder or Hub repository."""


class AutoPeftModel:
    """Base model by the class that the files record, for adapters without a task_type."""

    task_type: TaskType | None = None
    auto_class: str | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        raise OSError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: StrPath, adapter_name: str = DEFAULT,
                        is_trainable: bool = False, config: Any = None, revision: str | None = None,
                        import_allowlist: Sequence[str] | None = None, **kwargs: Any) -> PeftModel:  # fmt: skip
        """revision and subfolder are the adapter's; its config has the base's. kwargs go to the base's `from_pretrained`, those
        of the Hub to the adapter's too. import_allowlist: the packages of which an adapter without a task may name a class.

        Raises AdapterFileError where the files name no base model, or one of another package.
        """
        source = pretrained_model_name_or_path
        hub = {"revision": revision, "subfolder": kwargs.pop("subfolder", None)}
        hub |= {name: kwargs[name] for name in HUB if name in kwargs}
        folder = local_folder(source, **hub)
        given, config = config, read_config(folder) if config is None else config
        if not config.base_model_name_or_path:
            raise AdapterFileError(f"{folder}: adapter_config.json has no base_model_name_or_path: load the model, and "
                                   "PeftModel.from_pretrained(model, folder)")  # fmt: skip
        if cls.task_type is not None and config.task_type != cls.task_type:
            raise ValueError(
                f"Expected target PEFT task type: {cls.task_type.value}, but {folder} has {config.task_type}: take the "
                "class for that task, or AutoPeftModel"
            )
        base = cls.base_class(config, ALLOWED if import_allowlist is None else import_allowlist).from_pretrained(
            config.base_model_name_or_path, revision=config.revision or "main", **kwargs
        )
        if hasattr(base, "resize_token_embeddings") and has_tokenizer(source, folder, hub):
            trusted = kwargs.get("trust_remote_code", False)
            where = {k: v for k, v in hub.items() if v is not None}
            vocabulary = len(transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trusted, **where))
            if vocabulary > base.get_input_embeddings().num_embeddings:
                base.resize_token_embeddings(vocabulary)
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable, given)

    @classmethod
    def base_class(cls, config: AdapterConfig, allowed: Sequence[str]) -> Loader:
        """The class that loads the base model."""
        if cls.auto_class is not None:
            return getattr(transformers, cls.auto_class)
        named = config.auto_mapping or {}
        if "base_model_class" not in named:
            raise AdapterFileError(
                "the adapter records neither a task_type nor its base's class (auto_mapping): load the model, and "
                "PeftModel.from_pretrained(model, folder)"
            )
        name, package = str(named["base_model_class"]), str(named.get("parent_library", "transformers"))
        if not any(package == each or package.startswith(f"{each}.") for each in allowed):
            raise AdapterFileError(
                f"the adapter's auto_mapping names a class of {package!r}, which is not in import_allowlist "
                f"({', '.join(allowed)}): if you trust that package, import_allowlist=[{package!r}]"
            )
        try:
            found = getattr(import_module(package), name, None)
        except ImportError as error:
            raise AdapterFileError(
                f"the adapter's auto_mapping names {package!r}, which is not there: {error}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "from_pretrained")):
            raise AdapterFileError(f"base_model_class={name!r} is no model class of {package}: load the model yourself")
        return found


def has_tokenizer(source: StrPath, folder: Path, hub: dict) -> bool:
    """Whether the adapter's folder or repository has a tokenizer: it may have more tokens than the base model."""
    if Path(source).exists():
        return file_in(folder, TOKENIZER_CONFIG_NAME) is not None
    try:
        hf_hub_download(str(source), TOKENIZER_CONFIG_NAME, **hub)
    except EntryNotFoundError:
        return False
    return True


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
