"""Why a model or dataset cannot be read, and what to do about it: one wording for every program."""

from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedConfig


LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def read_config_dict(model: str, option: str) -> dict[str, Any]:
    """The entries of a model's config.json; no code that comes with the model is run.

    Args:
        model: folder or Hub id.
        option: how the user gave it, for errors.

    Raises:
        ValueError: if it cannot be read; with the reason and the remedy, without the access token.
    """
    try:
        values: dict[str, Any] = PreTrainedConfig.get_config_dict(model)[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {model!r} {why_unreadable(model, error)}") from error
    if not values:
        raise ValueError(f"{option} {model!r} is no model: it has no config.json. Give what save_pretrained wrote.")
    return values


def why_unreadable(name: str, error: Exception, kind: Literal["model", "dataset"] = "model") -> str:
    """What keeps a model or dataset from being read, and the remedy, to be said behind its name.

    Args:
        name: local path or Hub id.
        error: what reading it raised. The libraries' messages depend on where exactly they failed, so for what is not
            on disk the Hub is asked once more.
        kind: what it is to be.
    """
    found = None if Path(name).expanduser().exists() else _why_not_given(name, kind, error)
    return found or f"cannot be read: {reason(error)}"


def reason(error: Exception) -> str:
    """An error's message in one line, without the access token, which an answer of the Hub might repeat."""
    text, token = " ".join(str(error).split()), get_token()
    return text.replace(token, "TOKEN") if token else text


def _why_not_given(name: str, kind: str, error: Exception) -> str | None:
    """Why the Hub does not give a repository's files to this user; None if it does."""
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, GatedRepoError | RepositoryNotFoundError | OfflineModeIsEnabled):
            return _remedy(name, kind, first)
        first = first.__cause__
    try:
        validate_repo_id(name)
        HfApi().auth_check(name, repo_type=kind)
    except Exception as answer:  # the client's connection errors are of no built-in kind
        return _remedy(name, kind, answer)
    return None


def _remedy(name: str, kind: str, error: Exception) -> str:
    """What the Hub's refusal of a repository means."""
    hub = constants.ENDPOINT
    absent = f"is no local path, and not a {kind} on the Hub"
    if isinstance(error, HFValidationError):
        repository, _, revision = name.partition("@")
        remedy = f"`hf download {repository} --type {kind} --revision {revision} --local-dir FOLDER`, then give FOLDER"
        return f"{absent}, where names are USER/NAME: {remedy if revision else 'check the path'}."
    if isinstance(error, OfflineModeIsEnabled):
        return "is no local path, and the Hub is not asked as HF_HUB_OFFLINE is set: unset it, or check the path."
    if isinstance(error, GatedRepoError):
        page = f"{hub}/datasets/{name}" if kind == "dataset" else f"{hub}/{name}"
        return f"is gated: ask for access at {page}, then {LOG_IN}."
    if isinstance(error, RepositoryNotFoundError):
        return f"{absent}, or not shown to you: check the name; if it is private, {LOG_IN}."
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return "cannot be read, as the Hub refuses the access token: run `hf auth login`, or correct HF_TOKEN."
    if isinstance(error, HfHubHTTPError):
        return f"cannot be read, as the Hub refuses it: {reason(error)}"
    return f"{absent}: {hub} cannot be reached ({reason(error)}). Check the path or the connection."
