"""A loopback Hub for this process and for fresh ones, with what tests put on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
from hub_server import TOKEN, HubServer, Repository, serve_hub
from huggingface_hub import HfApi, constants


WRONG_TOKEN = "hf_" + "z9Y8" * 8


@contextmanager
def hub_for_this_process(home: Path) -> Iterator[HubServer]:
    """A Hub that knows TOKEN, and this process's libraries as if they had been imported with it and an empty home."""
    with serve_hub() as server, pytest.MonkeyPatch.context() as patch:
        server.token = TOKEN
        patch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "no_token"))
        patch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address that it was made with
        patch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", TOKEN)
        yield server


def environment(server: HubServer, home: Path, token: str = TOKEN) -> dict[str, str]:
    """That of a fresh process on a machine where nothing was downloaded yet."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    hub = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": token}
    return inherited | hub | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def upload(server: HubServer, folder: Path, name: str, private: bool = False) -> Repository:
    """Put a folder on the Hub in one commit, as its unmodified client does; `datasets/USER/NAME` is a dataset."""
    kind = "dataset" if name.startswith("datasets/") else "model"
    api, repo = HfApi(token=TOKEN), name.removeprefix("datasets/")
    api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, repo_type=kind)
    return server.repositories[name]


def files_with(token: str, *folders: Path) -> list[Path]:
    """The files below the folders that hold a token."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if token.encode() in path.read_bytes()]
