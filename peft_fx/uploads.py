"""Uploads to the Hugging Face hub: a folder in one commit."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def upload(fill: Callable[[Path, str], object], repo_id: str, *, commit_message: str, commit_description: str | None = None,
           private: bool | None = None, token: bool | str | None = None, revision: str | None = None,
           create_pr: bool = False) -> CommitInfo:  # fmt: skip
    """Uploads what `fill(folder, repository)` writes, and nothing else; returns the CommitInfo.

    The repository is made if need be.
    """
    from huggingface_hub import HfApi  # a config can do without it

    api = HfApi(library_name="peft_fx", library_version=version("peft-fx"))
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
    with TemporaryDirectory() as folder:
        fill(Path(folder), repo_id)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, commit_description=commit_description,
            token=token, create_pr=create_pr, revision=revision,
        )  # fmt: skip
