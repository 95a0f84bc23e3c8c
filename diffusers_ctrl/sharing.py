"""To the Hub: an adapter's folder, what of it is sent and what its card and its config then say; and a pipeline's with an adapter."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo

from . import assets
from .adapters import ADAPTER_FILES, CARD_FILES, CONFIG_NAME, config_text, load_adapter
from .cards import shared_card
from .hub import check_token, explained, is_repo_id, upload
from .untrusted import member


def push_adapter(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Uploads an adapter folder as one commit: its own files, its card, metrics.json and the pictures beside it, and nothing else of it.

    Args:
        folder: what `save_adapter` or training wrote. It is read and checked as a whole before anything is sent.
        base, base_revision: Hub id of the base, where the adapter was trained on a local copy of it. The config and the card that are
            sent name it; the folder itself keeps its own.
        token, private, revision, subfolder, create_pr, commit_message: as for diffusers' `push_to_hub`. private=True refuses a
            repository that exists and is public.

    Returns:
        URL of the commit or pull request.

    Raises:
        ValueError: if the folder is no whole adapter, its base is a folder of this machine, or the upload fails; with what to do.
            Trying again is safe.
    """
    folder = Path(folder)
    own = config = load_adapter(folder).config
    if base is not None:
        config = replace(own, base={**own.base, "id": base, "revision": base_revision})
    elif base_revision is not None:
        raise ValueError(
            f"base_revision {base_revision!r} was given without base: pass the Hub id that it is a revision of as base=."
        )
    check_shareable(config.base["id"])
    names = [*ADAPTER_FILES, *CARD_FILES, *(path.name for path in sorted(folder.glob("*.png")))]
    files: dict[str, Path | bytes] = {name: member(folder, name) for name in names if (folder / name).exists()}
    if config != own:
        files[CONFIG_NAME] = config_text(config).encode()
    if "README.md" in files:
        text = (folder / "README.md").read_text(encoding="utf-8")
        files["README.md"] = shared_card(text, own, config, repo_id, subfolder).encode()
    return upload(
        files,
        repo_id,
        managed=ADAPTER_FILES,
        subfolder=subfolder,
        token=token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "CTRL adapter",
    )


def check_shareable(base: str) -> None:
    """Raises ValueError unless others can load a base of this name: a Hub id or an embedded model, not a folder of this machine."""
    if assets.find(base) is None and (Path(base).is_dir() or not is_repo_id(base)):
        raise ValueError(
            f"The adapter's base {base!r} is a folder of this machine, which nobody else has: pass the Hub id of the same weights as base=."
        )


def push_pipeline(
    pipe: DiffusionPipeline,
    folder: Path,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> None:
    """Uploads a saved pipeline's folder, as diffusers' own `save_pretrained` does with one that it pushes. Raises ValueError if that fails."""
    check_token(token)
    repo_id = repo_id or folder.resolve().name
    with explained(f"The upload of {str(folder)!r} to {repo_id!r} could not be completed"):
        repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        card = populate_model_card(load_or_create_model_card(repo_id, token=token, is_pipeline=True))
        card.save(folder / "README.md")
        pipe._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)
