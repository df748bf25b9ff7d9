"""Upload a finished model to the Hub: `python -m training.publish --model runs/NAME/model --repo USER/NAME`.

All files go up in one commit, so nobody ever sees half a model. Files that are there already are not sent again, and
if nothing changed there is no commit: after a failure the same command is simply run again. Files that are only on the
Hub stay there. The token is the one of `hf auth login` or `HF_TOKEN`.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, get_token, metadata_load
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import ViTImageProcessor

from modeling_micl import __version__
from modeling_micl.remote_code import REMOTE_FILES
from training.config import setting
from training.evaluation import load_frozen
from training.parser import parse_settings
from training.results import table


NEEDED = ("README.md", "config.json", "eval.json", "preprocessor_config.json", *REMOTE_FILES)
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


@dataclass
class PublishConfig:
    """What goes where."""

    model: str | None = setting(None, "portable folder of a run; its figures go along")
    repo: str | None = setting(None, "where to on the Hub: USER/NAME or ORGANISATION/NAME, made if it is not there")
    private: bool = setting(False, "make a new repository private; an existing one must be")
    revision: str = setting("main", "branch to commit to; it must exist")
    tag: str | None = setting(None, "name for the published state, as v1")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        if self.model is None or not Path(self.model).is_dir():
            raise ValueError(f"model={self.model!r} is no folder: name a run's with --model runs/NAME/model.")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.repo or ""):
            raise ValueError(f"repo={self.repo!r} is no place on the Hub: write --repo USER/NAME.")


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
    for name, path in files.items():
        if path.suffix in (".md", ".json", ".py") and TOKEN.search(path.read_text(encoding="utf-8", errors="replace")):
            raise ValueError(f"{name} holds what looks like an access token: remove it there, and revoke the token.")
    try:
        if not metadata_load(files["README.md"]):
            raise ValueError("no metadata")
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"README.md must begin with YAML between two lines of ---: {reason}.") from error
    try:
        results = json.loads(files["eval.json"].read_text(encoding="utf-8"))["results"]
        if not all(isinstance(entry["value"], float | int) for entry in results):
            raise TypeError("a value is no number")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"eval.json is broken ({error!r}): take it from the run again.") from error
    try:
        ViTImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"preprocessor_config.json cannot be read: {error}") from error
    load_frozen(str(folder))


def publish(config: PublishConfig, files: dict[str, Path], token: str) -> dict[str, str]:
    """Upload in one commit, then tag it.

    Returns:
        What was done, as rows of a table.

    Raises:
        ValueError: if the repository is not as the settings say.
        HfHubHTTPError: if the Hub refuses.
        HTTPError, OSError, RuntimeError: if the connection breaks; nothing is visible then, or all of it.
    """
    api, repo = HfApi(token=token), str(config.repo)
    api.create_repo(repo, private=config.private or None, exist_ok=True)
    if config.private and not api.model_info(repo).private:
        raise ValueError(f"{repo} exists and is public: make it private with `hf repos settings {repo} --private`.")
    refs = api.list_repo_refs(repo)
    branches = {branch.name: branch.target_commit for branch in refs.branches}
    if config.revision not in branches:
        raise ValueError(
            f"{repo} has no branch {config.revision!r} (it has {', '.join(sorted(branches))}): "
            f"make it with `hf repos branch create {repo} {config.revision}`."
        )
    head = branches[config.revision]
    tagged = {tag.name: tag.target_commit for tag in refs.tags}.get(config.tag or "")
    check_tag(config, tagged, head)
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    message = f"Publish with modeling_micl {__version__}"
    commit = api.create_commit(repo, additions, commit_message=message, revision=config.revision)
    check_tag(config, tagged, commit.oid)
    if config.tag and not tagged:
        api.create_tag(repo, tag=config.tag, revision=commit.oid)
    done = {"commit": commit.commit_url if commit.oid != head else f"none, nothing changed since {head}"}
    return done | ({"tag": config.tag} if config.tag else {})


def check_tag(config: PublishConfig, tagged: str | None, commit: str) -> None:
    """Raise a ValueError if the tag names another commit than this one: readers rely on tags that never move."""
    if tagged not in (None, commit):
        raise ValueError(f"tag={config.tag!r} names commit {tagged}, not {commit}: give this state another --tag.")


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


def explain(error: Exception, config: PublishConfig) -> str:
    """What went wrong while sending, and the remedy."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to publish."
    if not isinstance(error, HfHubHTTPError):
        return f"the connection broke ({error!r}); run the same command again: it sends only what is missing."
    status = error.response.status_code
    remedies = {
        401: "it does not know the access token: run `hf auth login` or set HF_TOKEN to a valid one",
        403: f"the token may not write to {config.repo}: take one with write permission there, or another --repo",
        404: f"it shows this token no {config.repo}: check --repo and the token's permissions",
        412: "someone else committed at the same time: run the same command again",
    }
    remedy = remedies.get(status, "run the same command again" if status >= 500 else "see its answer")
    answer = f" It answered: {error.server_message}" if error.server_message else ""
    return f"the Hub refused ({status}): {remedy}.{answer}"


def main(config: PublishConfig) -> None:
    """Check, upload and print.

    Raises:
        ValueError: if something in the folder or the settings must be changed; nothing was sent, or nothing is lost.
        RuntimeError: if the Hub or the connection failed. No message holds the token.
    """
    folder = Path(str(config.model))
    files = files_to_publish(folder)
    check(folder, files)
    token = usable_token()
    try:
        rows = publish(config, files, token)
    except (HTTPError, OSError, RuntimeError) as error:
        raise RuntimeError(explain(error, config).replace(token, "TOKEN")) from None
    except ValueError as error:
        raise ValueError(str(error).replace(token, "TOKEN")) from None
    skipped = sorted({path.name for path in folder.iterdir()} - set(files) - {"figures"})
    rows |= {"left out": ", ".join(skipped)} if skipped else {}
    print(table(f"{config.repo} at {config.revision}: {len(files)} files", rows))  # noqa: T201


if __name__ == "__main__":
    try:
        main(parse_settings(PublishConfig, "training.publish"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.publish: {error}")
