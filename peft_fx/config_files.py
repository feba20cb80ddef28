"""What a config does with files, dicts and the hub, under PEFT's names."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .atomic import StrPath, write_files
from .errors import AdapterFileError, NotAFolderError, RecipeError, UnknownFieldError
from .fields import begun, default_of
from .notices import warn
from .suggestions import did_you_mean
from .uploads import upload

CONFIG_FILE = "adapter_config.json"
RUNTIME_ONLY = ("runtime_config",)  # fields of PEFT's that are never written


def later(module: str, name: str) -> Any:
    """What a module above has, which is imported when it is asked for: files take torch, which a config can do without."""
    return getattr(import_module(f".{module}", __package__), name)


@dataclass
class ConfigFiles:
    """Methods of `AdapterConfig`."""

    if TYPE_CHECKING:
        absent: ClassVar[frozenset[str]]
        peft_type: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """PEFT's on-disk dict, `peft_type` included."""
        unset = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) == default_of(f)}
        written = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.absent or k not in unset}
        plain = {name: getattr(written[name], "value", written[name]) for name in ("task_type", "peft_type")}
        lists = {name: sorted(value) for name, value in written.items() if isinstance(value, set)}
        return written | plain | lists

    def to_json(self) -> str:
        """PEFT's `adapter_config.json`: sorted keys, indent 2."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    def save_pretrained(self, save_directory: StrPath, auto_mapping_dict: dict | None = None) -> None:
        """Writes `adapter_config.json`, whole or not at all. auto_mapping_dict: in place of the config's own.

        Raises AdapterFileError.
        """
        folder = Path(save_directory)
        changes: dict[str, Any] = {} if auto_mapping_dict is None else {"auto_mapping": auto_mapping_dict}
        written = dataclasses.replace(self, **changes) if changes else self
        text = written.to_json()
        if os.path.isfile(folder):
            raise NotAFolderError(f"{folder} is a file, expected a folder to write {CONFIG_FILE} into")
        write_files(folder, {CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8")})

    def push_to_hub(self, repo_id: str, *, commit_message: str | None = None, commit_description: str | None = None,
                    private: bool | None = None, token: bool | str | None = None, revision: str | None = None,
                    create_pr: bool = False) -> Any:  # fmt: skip
        """Uploads `adapter_config.json`; returns the CommitInfo. The repository is made if need be."""
        return upload(
            lambda folder, _: self.save_pretrained(folder), repo_id, commit_message=commit_message or "Upload config",
            commit_description=commit_description, private=private, token=token, revision=revision, create_pr=create_pr,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: StrPath, subfolder: str | None = None, **options: Any
    ) -> Self:
        """The config in a folder or a Hub repository, of this class or one derived from it.

        options: revision, token and whatever else huggingface_hub's `snapshot_download` takes. Fields of a config are as the
        file has them, and are named in a warning where the file has another value. Raises AdapterFileError, and
        RecipeError for another method's config.
        """
        names = {f.name for f in dataclasses.fields(cls)} - {"revision"}  # which is the Hub's
        hub = {name: value for name, value in options.items() if name not in names}
        config = later("files.read", "read_config")(pretrained_model_name_or_path, subfolder, **hub)
        if not isinstance(config, cls):
            raise RecipeError(
                f"{pretrained_model_name_or_path}: expected a {cls.__name__}, got a {type(config).__name__}: read it with "
                "PeftConfig"
            )
        given = {name: value for name, value in options.items() if name in names}
        if others := sorted(name for name, value in given.items() if getattr(config, name) != value):
            warn(
                f"{pretrained_model_name_or_path}: {', '.join(others)}: the file's values are taken, not those that are given: "
                f"change them in the config that is read: config.{others[0]} = ..."
            )
        return config

    @classmethod
    def from_json_file(cls, path_json_file: StrPath) -> dict[str, Any]:
        """The dict in a JSON file, without what is for run time alone. Raises AdapterFileError."""
        path = Path(path_json_file)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise AdapterFileError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise AdapterFileError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise AdapterFileError(f"{path}: expected a JSON object, got {type(data).__name__}")
        if found := [name for name in RUNTIME_ONLY if name in data]:
            warn(f"{path}: {', '.join(found)}: is for run time and left out; set it in the config that is read")
        return {key: value for key, value in data.items() if key not in found}

    @classmethod
    def from_peft_type(cls, **fields: Any) -> Any:
        """A config of the class for `peft_type`, of this class without one. Unknown fields are left out with a warning."""
        kind = cls if fields.get("peft_type") is None else later("methods", "get_config")(fields["peft_type"])
        return kind.from_dict(fields, f"{kind.__name__}.from_peft_type")

    @classmethod
    def check_kwargs(cls, **fields: Any) -> dict[str, Any]:
        """Fields as the class takes them, for subclasses to check or change before a config is made."""
        return fields

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str | None = None) -> Self:
        """Reads a config dict. Unknown keys are an error unless they hold an empty value, as newer versions write.

        where: the adapter's file, if `data` is from one: unknown keys are other programs' or newer versions' then, and are
        left out with a warning; how the adapter began may be anything. Raises RecipeError for unknown fields that are set,
        and for values of the wrong type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        others = data.keys() - known.keys()
        unknown = sorted(key for key in others if data[key] not in (None, False, {}, [], "none"))
        if where is not None:
            values = {key: begun(known[key], value) for key, value in values.items()}
            if unknown:
                warn(
                    f"{where}: {cls.__name__} does not know {', '.join(unknown)}, which another program or a newer PEFT wrote: "
                    "read without; if they change what the adapter computes, outputs are others"
                )
        elif unknown:
            name, value = unknown[0], data[unknown[0]]
            hint = did_you_mean(name, known) or f"; known: {sorted(known)}"
            raise UnknownFieldError(f"{cls.peft_type}: unknown config field {name!r} = {value!r}{hint}")
        return cls(**cls.check_kwargs(**values))
