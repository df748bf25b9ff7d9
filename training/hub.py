"""A model folder to the Hub: what goes there, the checks before, one commit, and errors that tell the remedy.

All files go up in one commit, so nobody ever sees half a model. Files that are there already are not sent again, and
if nothing changed there is no commit: after a failure the same is simply done again. Files that are only on the Hub
stay there. The token is the one of `hf auth login` or `HF_TOKEN`.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import ViTImageProcessor

from modeling_micl import __version__
from modeling_micl.remote_code import REMOTE_FILES
from training.card import without_local_paths
from training.evaluation import load_frozen
from training.results import EVALUATION


NEEDED = ("README.md", "config.json", EVALUATION, "preprocessor_config.json", *REMOTE_FILES)
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


@dataclass
class Place:
    """Where a model goes.

    Attributes:
        repo: USER/NAME or ORGANISATION/NAME, made if it is not there.
        private: make a new repository private; an existing one must be.
        revision: branch to commit to; it must exist.
        tag: name for the published state, None for none.
    """

    repo: str
    private: bool = False
    revision: str = "main"
    tag: str | None = None

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.split("/")[-1]


def files_to_publish(folder: Path) -> dict[str, Path]:
    """The files of a portable folder that go to the Hub, by their path there.

    Only what this package writes and others read safely: never pickles (`*.bin`, `*.pt`, ...), checkpoints or hidden
    files; of code the models' own, which is run only where the user says so. Figures are those in the folder and, if
    it is a run's `model` folder, the run's.

    Raises:
        ValueError: if a file is missing.
    """
    folder = folder.resolve()
    weights = {path.name: path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))}
    if not any(name.endswith(".safetensors") for name in weights):
        raise ValueError(f"{folder} has no model.safetensors: write the folder with save_pretrained.")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: publish the model/ folder that a run of training.* wrote.")
    places = [folder.parent / "figures"] * (folder.name == "model") + [folder / "figures"]
    figures = {f"figures/{path.name}": path for place in places for path in sorted(place.glob("*.png"))}
    return {name: folder / name for name in NEEDED} | weights | figures


def check(folder: Path, files: dict[str, Path]) -> None:
    """Raise a ValueError unless others can use these files and they hold no access token."""
    check_no_token(files)
    try:
        ViTImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"preprocessor_config.json cannot be read: {error}") from error
    load_frozen(str(folder))


def check_no_token(files: dict[str, Path]) -> None:
    """Raise a ValueError if a file that people read holds an access token."""
    for name, path in files.items():
        if path.suffix in (".md", ".json", ".py") and TOKEN.search(path.read_text(encoding="utf-8", errors="replace")):
            raise ValueError(f"{name} holds what looks like an access token: remove it there, and revoke the token.")


def upload(place: Place, files: dict[str, Path], token: str) -> dict[str, str]:
    """Upload in one commit, then tag it.

    Returns:
        What was done, as rows of a table.

    Raises:
        ValueError: if the repository is not as it should be.
        RuntimeError: if the Hub refuses or the connection breaks; nothing is visible then, or all of it.
    """
    api, repo = HfApi(token=token), place.repo
    with explained(place, token):
        open_repository(api, place)
        refs = api.list_repo_refs(repo)
        branches = {branch.name: branch.target_commit for branch in refs.branches}
        if place.revision not in branches:
            raise ValueError(
                f"{repo} has no branch {place.revision!r} (it has {', '.join(sorted(branches))}): "
                f"make it with `hf repos branch create {repo} {place.revision}`."
            )
        head = branches[place.revision]
        tagged = {tag.name: tag.target_commit for tag in refs.tags}.get(place.tag or "")
        check_tag(place, tagged, head)
        message = f"Publish with modeling_micl {__version__}"
        commit = api.create_commit(repo, additions(files), commit_message=message, revision=place.revision)
        check_tag(place, tagged, commit.oid)
        if place.tag and not tagged:
            api.create_tag(repo, tag=place.tag, revision=commit.oid)
    done = {"commit": commit.commit_url if commit.oid != head else f"none, nothing changed since {head}"}
    return done | ({"tag": place.tag} if place.tag else {})


def additions(files: dict[str, Path]) -> list[CommitOperationAdd]:
    """The files as they go up; of eval.json a copy without absolute paths."""
    published = json.dumps(without_local_paths(json.loads(files[EVALUATION].read_text())), indent=2) + "\n"
    return [
        CommitOperationAdd(name, published.encode() if name == EVALUATION else path) for name, path in files.items()
    ]


def open_repository(api: HfApi, place: Place) -> None:
    """Make the repository if it is not there; raises a ValueError if it is public but must be private."""
    api.create_repo(place.repo, private=place.private or None, exist_ok=True)
    if place.private and not api.model_info(place.repo).private:
        raise ValueError(
            f"{place.repo} exists and is public: make it private with `hf repos settings {place.repo} --private`."
        )


def check_tag(place: Place, tagged: str | None, commit: str) -> None:
    """Raise a ValueError if the tag names another commit than this one: readers rely on tags that never move."""
    if tagged not in (None, commit):
        raise ValueError(f"tag={place.tag!r} names commit {tagged}, not {commit}: give this state another --tag.")


def usable_token() -> str:
    """The token of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: if there is none, or it cannot be sent.
    """
    token = get_token()
    if not token:
        raise ValueError("there is no access token: run `hf auth login`, or set HF_TOKEN to one that may write.")
    if not re.fullmatch(r"[!-~]+", token):  # the client would quote it in its message
        raise ValueError("the access token has characters that no token has: copy it again.")
    return token


@contextmanager
def explained(place: Place, token: str) -> Iterator[None]:
    """Turn what the client raises into a RuntimeError with the remedy; no message holds the token."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        raise RuntimeError(explain(error, place).replace(token, "TOKEN")) from None
    except ValueError as error:
        raise ValueError(str(error).replace(token, "TOKEN")) from None


def explain(error: Exception, place: Place) -> str:
    """What went wrong while sending, and the remedy."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to publish."
    if not isinstance(error, HfHubHTTPError):
        return f"the connection broke ({error!r}); run the same command again: it sends only what is missing."
    status = error.response.status_code
    remedies = {
        401: "it does not know the access token: run `hf auth login` or set HF_TOKEN to a valid one",
        403: f"the token may not write to {place.repo}: take one with write permission there, or another repository",
        404: f"it shows this token no {place.repo}: check the name and the token's permissions",
        412: "someone else committed at the same time: run the same command again",
    }
    remedy = remedies.get(status, "run the same command again" if status >= 500 else "see its answer")
    answer = f" It answered: {error.server_message}" if error.server_message else ""
    return f"the Hub refused ({status}): {remedy}.{answer}"
