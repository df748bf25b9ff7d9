"""Settings from a YAML recipe and flags: one flag per field of a dataclass, all checked before anything is loaded."""

import difflib
import json
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool


class Settings(Protocol):
    """A dataclass with a default for every field that can check its values."""

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""


Kind = TypeVar("Kind", bound=Settings)


class _Parser(HfArgumentParser):
    """Reports mistakes in one line instead of printing every flag there is."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)


def parse_settings(kind: type[Kind], program: str, argv: Sequence[str] | None = None) -> Kind:
    """Settings from `--config recipe.yaml` and flags, which win over the recipe.

    Args:
        kind: dataclass of the settings.
        program: name of the entry point, for messages.
        argv: flags; those of the command line when unset.

    Raises:
        SystemExit: with status 2 and one line that says what is wrong: an unknown key and the nearest valid one, a
            value of a wrong type, or an impossible setting.
    """
    parser = _Parser(kind, prog=program, allow_abbrev=False, conflict_handler="resolve")
    parser.add_argument("--config", help="YAML recipe; flags win over it")
    # HfArgumentParser gives an optional boolean neither a bare --flag nor a --no-flag.
    parser.add_argument("--streaming", nargs="?", const=True, type=string_to_bool)
    parser.add_argument("--no_streaming", "--no-streaming", dest="streaming", action="store_false", default=SUPPRESS)
    flags = list(sys.argv[1:] if argv is None else argv)
    recipe = parser.parse_known_args(flags)[0].config
    try:
        flags = _recipe_flags(recipe, kind) + flags if recipe else flags
        settings, _, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ValueError(f"unknown flag {unknown[0]}{_nearest(unknown[0], kind)}")
        settings.validate()
    except ValueError as error:
        parser.error(str(error))
    assert isinstance(settings, kind)
    return settings


def _recipe_flags(path: str, kind: type[Settings]) -> list[str]:
    """A YAML recipe as flags, so that the parser checks its types, too (YAML takes 5e-5 for a string)."""
    try:
        recipe = yaml.load(Path(path).read_text(), Loader=yaml.BaseLoader)  # strings: `no` may be a word
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path} must hold 'key: value' lines")
    flags = []
    for key, value in recipe.items():
        if key not in _names(kind):
            raise ValueError(f"unknown key {key!r} in {path}{_nearest(str(key), kind)}")
        several = isinstance(value, list) and isinstance(getattr(kind(), key), list)
        value = json.dumps(value) if isinstance(value, dict) else value
        if value not in ("", "~", "null"):
            flags += [f"--{key}", *value] if several else [f"--{key}={value}"]
    return flags


def _names(kind: type[Settings]) -> list[str]:
    return [field.name for field in fields(kind)]  # type: ignore[arg-type]


def _nearest(name: str, kind: type[Settings]) -> str:
    name = name.lstrip("-").split("=")[0].replace("-", "_")
    nearest = difflib.get_close_matches(name, _names(kind), n=1)
    return f": did you mean {nearest[0]!r}?" if nearest else "; --help lists all"
