"""`push_to_hub`: an adapter's files and its card, and nothing else, in one commit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import CommitInfo, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from ...uploads import upload

if TYPE_CHECKING:
    from ..model.model import PeftModel


def push_to_hub(model: PeftModel, repo_id: str, *, commit_message: str | None = None, commit_description: str | None = None,
                private: bool | None = None, token: bool | str | None = None, revision: str | None = None,
                create_pr: bool = False, max_shard_size: int | str | None = None, tags: list[str] | None = None,
                **saving: Any) -> CommitInfo:  # fmt: skip
    """Uploads what `model.save_pretrained` writes. The repository is made if need be; a card that it has keeps its text.

    transformers' own would put a card of its making in place of ours. saving: arguments of `save_pretrained`. max_shard_size
    is not read: adapters are one file.
    """

    def fill(folder: Path, repository: str) -> None:
        file = folder / "README.md"
        with suppress(EntryNotFoundError):
            ModelCard.load(repository, token=cast("str | None", token)).save(file)  # which takes what others do
        model.save_pretrained(folder, **saving)
        card = ModelCard.load(file)
        card.data.tags = sorted({*(card.data.tags or ()), *(tags or ())})
        card.save(file)

    return upload(
        fill, repo_id, commit_message=commit_message or "Upload adapter", commit_description=commit_description,
        private=private, token=token, revision=revision, create_pr=create_pr,
    )  # fmt: skip
