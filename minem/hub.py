"""Files from the Hugging Face hub, with its many ways of failing told in one sentence each.

The token comes from the environment (HF_TOKEN) or from `hf auth login`; with HF_HUB_OFFLINE=1 only the cache is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from minem.errors import UserError

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
    """The local folder that holds the files of a repository that match `patterns`, downloading what is not cached.

    Raises:
        UserError: the repository is missing, gated or out of reach; the sentence says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{kind} {repo_id!r}"

    def fetch(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                repo_type=kind,
                allow_patterns=patterns,
                revision=revision,
                local_files_only=local_files_only,
            )
        )

    try:
        try:
            return fetch(local_files_only=_CACHE_ONLY.get())
        except OfflineModeIsEnabled:
            # A revision that is a full commit is looked up on the hub before the cache: ask the cache alone.
            return fetch(local_files_only=True)
    except GatedRepoError as error:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        raise UserError(
            f"{what} is gated: accept its terms at {page}, then set HF_TOKEN to a token that may read it, or run "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{what} does not exist on the hub, or is private and HF_TOKEN gives no access to it"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what} has no revision {revision!r}; see its branches and tags on the hub") from error
    except HFValidationError as error:
        raise UserError(f"{what} is not a valid hub id, which looks like owner/name") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # reached, but it refused or was out of order
            raise UserError(_failed(what, error.__cause__)) from error
        raise UserError(
            f"{what} is not in the local cache and the hub cannot be reached: connect once to download it, "
            f"or give the path of a local folder"
        ) from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise UserError(f"{what}: the hub does not know your token; set HF_TOKEN to a valid one") from error
        raise UserError(_failed(what, error)) from error
    except Exception as error:  # proxies, timeouts, full disks: the client has several libraries' errors for them
        raise UserError(_failed(what, error)) from error


def _failed(what: str, error: Exception) -> str:
    said = getattr(error, "server_message", None)  # the hub's own words, where it has any
    reason = " ".join(f"{next(iter(str(error).strip().splitlines()), '')} {said or ''}".split())[:300]
    reason = reason or type(error).__name__
    return f"{what} could not be downloaded ({reason}); try again, or give the path of a local folder"
