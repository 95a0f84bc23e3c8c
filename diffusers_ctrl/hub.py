"""Files to and from the Hugging Face Hub: named files of one commit down, one commit up, and errors that say what to do.

Nothing here knows what the files mean; adapters.py does.
"""

from __future__ import annotations

import errno
import glob
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id


MAX_DOWNLOAD_BYTES = 16 * 2**30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
XET_FUNCTIONS = ("_upload_xet_files", "xet_get")  # the client's own, in which hf_xet is called
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def is_repo_id(name: str) -> bool:
    """Whether `name` is written as a Hub id is: NAME or USER/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_token(token: str | bool | None) -> None:
    """Raises ValueError, without the token in it, for one that could not be sent: the client's own error would print it."""
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("token has a character that no Hub token has, a line break perhaps: pass it without.")


def check_subfolder(subfolder: str | None) -> str:
    """The subfolder with a slash behind it, or "". Raises ValueError for a path that leaves the repository."""
    if not subfolder:
        return ""
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts or "\\" in subfolder or ":" in subfolder:
        raise ValueError(f"subfolder {subfolder!r} leaves the repository: use a relative path without '..'.")
    return "" if str(path) == "." else f"{path}/"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def advice(error: BaseException) -> str | None:
    """What happened on the way to or from the Hub, and what to do about it; None for an error of another kind."""
    chain = list(_chain(error))

    def first(*kinds: type) -> Any:
        return next((e for e in chain if isinstance(e, kinds)), None)

    if any(isinstance(e, OSError) and e.errno in DISK_FULL for e in chain):
        return "the disk is full: free some space (the Hub's cache is in HF_HOME, or cache_dir=) and try again"
    refused = next((e for e in chain if isinstance(e, OSError) and e.errno in NO_ACCESS and e.filename is not None), None)
    if refused is not None:
        return f"{refused.filename} cannot be read or written: check its permissions (the Hub's cache is in HF_HOME, or cache_dir=)"
    if first(HFValidationError):
        return "that is not a Hub id, which is written USER/NAME"
    if first(GatedRepoError):
        return "access to it is restricted: accept its conditions on its page, and log in (`hf auth login`) or pass token="
    if first(RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, and log in (`hf auth login`) or pass token="
    if first(RevisionNotFoundError):
        return "it has no such revision: check revision="
    answered = first(HfHubHTTPError)
    if answered is not None and answered.response is not None:
        status = answered.response.status_code
        known = {
            401: "the Hub did not accept the token: log in again (`hf auth login`) or pass another token=",
            403: "the token may not do this: pass one with write access to that namespace",
            404: "the Hub does not have it: check the name and revision=",
            409: "someone else changed the repository meanwhile: try again",
            412: "someone else changed the repository meanwhile: try again",
            413: "the Hub found it too large",
            429: "the Hub had too many requests from here: wait some minutes and try again",
        }
        if status in known:
            return known[status]
        return f"the Hub failed (status {status}): try again later" if status >= 500 else f"the Hub refused (status {status})"
    if any(frame.name in XET_FUNCTIONS for e in chain for frame in traceback.extract_tb(e.__traceback__)):
        # hf_xet raises ConnectionError, RuntimeError and others; the client does not go on without it
        return "the Hub's Xet storage failed or could not be reached: try again, or go without it (HF_HUB_DISABLE_XET=1)"
    if any("TransportError" in {kind.__name__ for kind in type(e).__mro__} for e in chain):  # httpx's own, whichever release it is
        return f"the connection to {constants.ENDPOINT} broke or could not be made: check it and try again"
    if any("Consistency check failed" in str(e) for e in chain if isinstance(e, OSError)):
        return "a file came incomplete: try again"
    if first(OfflineModeIsEnabled, LocalEntryNotFoundError):
        return "it is not in the cache, and nothing may be downloaded: try once without local_files_only and HF_HUB_OFFLINE"
    if first(EntryNotFoundError):
        return "a file of it is missing on the Hub"
    return None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns the Hub's and the connection's errors in the block into one ValueError, "{what}: {advice}."; others pass."""
    try:
        yield
    except Exception as error:
        said = advice(error)
        if said is None:
            raise
        raise ValueError(f"{what}: {said}.") from error


def cached_commit(repo_id: str, filename: str, revision: str | None = None, cache_dir: str | Path | None = None) -> str | None:
    """The commit (40 hex digits) that a file in the cache came from, or None: what to write down where a branch was given."""
    path = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
    if not isinstance(path, str):
        return None
    parts = Path(path).parts
    return parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]


def download(
    repo_id: str,
    names: Iterable[str],
    *,
    marker: str,
    required: Iterable[str] = (),
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = False,
    force_download: bool | None = False,
) -> Path | None:
    """Those of the files `names` that the repository has, all of one commit, in the Hub's cache; no other file is fetched.

    Args:
        marker: the file that says the repository is one of ours. It is fetched first.
        required: of `names`, those that such a repository has. Where the Hub fails half-way, a cache that has them will do.
        subfolder: where in the repository to look.

    Returns:
        The local folder, or None if the repository exists and has no `marker`.

    Raises:
        ValueError: if it cannot be reached or is too large; the message says what to do.
    """
    check_token(token)
    prefix = check_subfolder(subfolder)
    local_files_only = bool(local_files_only) or is_offline_mode()
    common: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    common["force_download"] = bool(force_download) and not local_files_only
    with explained(f"{repo_id!r} could not be downloaded from the Hub"):
        try:
            found = Path(hf_hub_download(repo_id, prefix + marker, revision=revision, **common))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError:
            # no connection: a repository of which other files are here, but not this one, was no adapter when it was fetched
            if local_files_only and not prefix and _is_cached_without(repo_id, marker, revision, cache_dir):
                return None
            raise
        root = found.parents[prefix.count("/")]
        if root.parent.name != "snapshots":
            raise ValueError(f"{found} is not where the Hub's cache keeps files.")
        wanted = [prefix + name for name in names]
        if not local_files_only:
            try:
                infos = HfApi(token=token).get_paths_info(repo_id, wanted, revision=root.name)
            except Exception as error:  # the Hub went away: what is in the cache will do, as everywhere
                if advice(error) is None or not all((root / prefix / name).is_file() for name in required):
                    raise
                common |= {"local_files_only": True, "force_download": False}
            else:
                size = sum(info.size for info in infos if isinstance(info, RepoFile))
                if size > MAX_DOWNLOAD_BYTES:
                    raise ValueError(f"{repo_id!r} has {size:,} bytes of weights; more than {MAX_DOWNLOAD_BYTES:,} are not read.")
        # by commit, so that all files are of one commit even if someone pushes meanwhile
        snapshot = snapshot_download(repo_id, revision=root.name, allow_patterns=[glob.escape(name) for name in wanted], **common)
    return Path(snapshot) / prefix


def _is_cached_without(repo_id: str, marker: str, revision: str | None, cache_dir: str | Path | None) -> bool:
    other = try_to_load_from_cache(repo_id, "model_index.json", cache_dir=cache_dir, revision=revision)
    return isinstance(other, str) and not (Path(other).parent / marker).exists()


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    managed: Iterable[str] = (),
    subfolder: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with diffusers_ctrl",
) -> str:
    """Uploads files as one commit, so that no reader ever sees half of them; creates the repository and the branch if need be.

    Args:
        files: name in the repository -> local file or content.
        managed: names that are deleted in the same commit where the repository has them and `files` does not.
        private: visibility of a new repository; True refuses one that exists and is public.
        revision: branch to commit to.
        create_pr: open a pull request instead.

    Returns:
        URL of the commit (of the last one if nothing has changed), or of the pull request.

    Raises:
        ValueError: with what to do. The files there are as they were (or, if only the answer was lost, as they should be): trying again is safe.
    """
    check_token(token)
    prefix = check_subfolder(subfolder)
    api = HfApi(token=token)
    with explained(f"The upload to {repo_id!r} could not be completed"):
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id!r} exists and is public, and private=True was asked for: make it private on its page first."
            )
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=None if create_pr else revision))
        stale = sorted({prefix + name for name in managed} & there - {prefix + name for name in files})
        operations = [
            *(
                CommitOperationAdd(prefix + name, content if isinstance(content, bytes) else str(content))
                for name, content in files.items()
            ),
            *(CommitOperationDelete(name) for name in stale),
        ]
        # create_commit, not upload_folder: that one may split a folder into several commits
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr)
    return commit.pr_url or commit.commit_url
