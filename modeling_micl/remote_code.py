"""The models' code inside a saved MiCL folder, for people without this package.

They load such a folder with `AutoModel.from_pretrained(FOLDER_OR_HUB_ID, trust_remote_code=True)`, and likewise with
every other Auto class in `AUTO_MAP`. Where this package is imported its own code is used, never that of a folder.
"""

import json
from os import PathLike
from pathlib import Path

from .configuration_micl import MiclConfig


# What transformers copies and runs: modules side by side that import each other by `from .module import name` only.
REMOTE_FILES = ("configuration_micl.py", "losses.py", "masking.py", "modeling_micl.py")
AUTO_MAP = {
    "AutoConfig": "configuration_micl.MiclConfig",
    "AutoModel": "modeling_micl.MiclModel",
    "AutoModelForPreTraining": "modeling_micl.MiclForPreTraining",
    "AutoModelForImageClassification": "modeling_micl.MiclForImageClassification",
    "AutoBackbone": "modeling_micl.MiclBackbone",
}


def add_remote_code(folder: str | PathLike[str]) -> None:
    """Make a saved MiCL folder loadable without this package, with any Auto class and whatever it was saved from.

    `save_pretrained` itself names only the saved class. The code goes first and config.json last, each in one
    move, so a crash never leaves a config that names code which is not there. Of config.json only `auto_map` changes;
    an older one is replaced as a whole, since it may name other people's code.

    Args:
        folder: that `save_pretrained` of a MiCL model or config wrote.

    Raises:
        ValueError: if it has no config.json of a MiCL model; nothing was written then.
    """
    config = Path(folder) / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if values.get("model_type") != MiclConfig.model_type:
        raise ValueError(
            f"{str(folder)!r} has no config.json with model_type={MiclConfig.model_type!r}: give a folder that "
            "save_pretrained of a MiCL model wrote."
        )
    for name in REMOTE_FILES:
        _replace(config.with_name(name), Path(__file__).with_name(name).read_bytes())
    _replace(config, (json.dumps(values | {"auto_map": AUTO_MAP}, indent=2) + "\n").encode())


def _replace(file: Path, content: bytes) -> None:
    unfinished = file.with_name(f".tmp-{file.name}")
    unfinished.write_bytes(content)
    unfinished.replace(file)


__all__ = ["AUTO_MAP", "REMOTE_FILES", "add_remote_code"]
