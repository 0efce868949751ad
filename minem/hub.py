"""Files from the Hugging Face hub; each of its ways to fail becomes one sentence with the remedy.

    python -c "from minem.hub import download; print(download('Qwen/Qwen3-0.6B', 'model', ['*.json']))"

The token comes from the environment (HF_TOKEN) or from `hf auth login`; with HF_HUB_OFFLINE=1 only the cache is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from minem.errors import UserError, reason

_CACHE_ONLY = ContextVar("cache_only", default=False)


@contextmanager
def cache_only() -> Iterator[None]:
    """Within the block, `download` reads the local cache and never asks the hub."""
    token = _CACHE_ONLY.set(True)
    try:
        yield
    finally:
        _CACHE_ONLY.reset(token)


def download(repo_id: str, kind: Literal["model", "dataset"], patterns: list[str], revision: str | None = None) -> Path:
    """The local folder with a repository's files that match `patterns`. UserError has the remedy if one is missing."""
    from huggingface_hub import constants, snapshot_download

    asked: Any = {"repo_type": kind, "allow_patterns": patterns, "revision": revision}
    # Offline, too: a revision that is a full commit would be looked up on the hub before the cache.
    local = _CACHE_ONLY.get() or constants.HF_HUB_OFFLINE
    try:
        return Path(snapshot_download(repo_id, local_files_only=local, **asked))
    except Exception as error:  # proxies, timeouts, full disks: the client raises errors of several libraries
        raise UserError(_explain(error, repo_id, kind, revision)) from error


def _explain(error: Exception, repo_id: str, kind: str, revision: str | None) -> str:
    """The sentence for an error of huggingface_hub."""
    from huggingface_hub import errors as hub

    what = f"{kind} {repo_id!r}"
    if isinstance(error, hub.GatedRepoError):
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        remedy = "then set HF_TOKEN to a token that may read it, or run `hf auth login`"
        return f"{what} is gated: accept its terms at {page}, {remedy}"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"{what} does not exist on the hub, or is private and HF_TOKEN gives no access to it"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{what} has no revision {revision!r}; see its branches and tags on the hub"
    if isinstance(error, hub.HFValidationError):
        return f"{what} is not a valid hub id, which looks like owner/name"
    if isinstance(error, hub.LocalEntryNotFoundError):
        if not isinstance(error.__cause__, hub.HfHubHTTPError):
            remedy = "connect once to download it, or give the path of a local folder"
            return f"{what} is not in the local cache and the hub cannot be reached: {remedy}"
        error = error.__cause__  # the hub was reached and refused or failed
    elif isinstance(error, hub.HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return f"{what}: the hub does not know your token; set HF_TOKEN to a valid one"
    return f"{what} could not be downloaded ({reason(error)}); try again, or give the path of a local folder"
