"""What a loopback Hub keeps in memory: repositories and their commits, and how the Hub tells of files."""

import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Any


LARGE = (".safetensors", ".png", ".parquet")


@dataclass
class Commit:
    files: dict[str, bytes]
    changed: list[str]
    oid: str = field(default_factory=lambda: secrets.token_hex(20))


@dataclass
class Repository:
    private: bool
    gated: bool = False  # its files are for nobody, as before the request for access is granted
    commits: list[Commit] = field(default_factory=lambda: [Commit({".gitattributes": b""}, [])])
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches["main"] = self.commits[0].oid

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)


def upload_mode(commit: Commit, path: str) -> dict[str, Any]:
    """How a file is to be sent, and what the client compares with its own to see whether it changed."""
    data, large = commit.files.get(path), path.endswith(LARGE)
    info = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    if data is None:
        return info
    return info | {"oid": hashlib.sha256(data).hexdigest() if large else _blob(data)}


def _blob(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def tree(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files in a folder and its sub-folders, as deep as asked for."""
    entries = {}
    for path, data in commit.files.items():
        inner = path.removeprefix(f"{folder}/") if folder else path
        if folder and inner == path:
            continue
        parts = inner.split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            name = "/".join([*([folder] if folder else []), *parts[:depth]])
            entries[name] = {"type": "directory", "path": name, "oid": _blob(name.encode())}
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    return list(entries.values())
