"""`push_to_hub`: an adapter's files and its card, and nothing else, in one commit."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError


def push_to_hub(model, repo_id: str, *, commit_message: str | None = None, commit_description: str | None = None,
                private: bool | None = None, token: bool | str | None = None, revision: str | None = None,
                create_pr: bool = False, max_shard_size: int | str | None = None, tags: list[str] | None = None,
                **saving) -> CommitInfo:  # fmt: skip
    """Uploads what `model.save_pretrained` writes. The repository is made if need be; a card that it has keeps its text.

    transformers' own would put a card of its making in place of ours. saving: arguments of `save_pretrained`. max_shard_size
    is not read: adapters are one file.
    """
    api = HfApi(library_name="peft_fx", library_version=version("peft-fx"))
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "README.md"
        with suppress(EntryNotFoundError):
            ModelCard.load(repo_id, token=token).save(file)
        model.save_pretrained(folder, **saving)
        card = ModelCard.load(file)
        card.data.tags = sorted({*(card.data.tags or ()), *(tags or ())})
        card.save(file)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message or "Upload adapter",
            commit_description=commit_description, token=token, create_pr=create_pr, revision=revision,
        )  # fmt: skip
