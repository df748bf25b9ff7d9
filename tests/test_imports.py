"""Imports point one way, see the package map; and nothing grows too long."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "modeling_micl").rglob("*.py"))
TRAINING = sorted((ROOT / "training").rglob("*.py"))
ORDER = ["hub_access", "masking", "configuration_micl", "losses", "modeling_micl", "remote_code", "parameter_names"]
ORDER += ["convert_checkpoint", "export_vit", "__init__"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_LINES = {"file": 320, "function": 60}
# It is remote code, one flat set of files.
LONGER = {"modeling_micl/modeling_micl.py": 540}


def imports(path: Path) -> set[tuple[str, str]]:
    """(source, name) of every `from source import name`, leading dots included; (source, "") of `import source`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {("." * node.level + (node.module or ""), alias.name) for alias in node.names}
    return found


def is_entry_point(path: Path) -> bool:
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in ast.parse(path.read_text()).body
    )


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_packages_are_found() -> None:
    assert {path.stem for path in PACKAGE} >= {"configuration_micl", "masking", "losses", "modeling_micl"}
    assert TRAINING


@pytest.mark.parametrize("path", PACKAGE, ids=names)
def test_the_package_imports_torch_transformers_and_itself_only(path: Path) -> None:
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    absolute = {source for source, _ in imports(path) if not source.startswith(".")}
    assert {source for source in absolute if source.split(".")[0] not in allowed} == set()


@pytest.mark.parametrize("path", PACKAGE, ids=names)
def test_the_package_imports_itself_in_one_direction_and_as_remote_code_can(path: Path) -> None:
    relative = {source for source, _ in imports(path) if source.startswith(".")}
    assert relative <= {
        f".{earlier}" for earlier in ORDER[: ORDER.index(path.stem)]
    }  # so never `from . import module`


@pytest.mark.parametrize("path", TRAINING, ids=names)
def test_nothing_imports_an_entry_point(path: Path) -> None:
    entry_points = {f"training.{other.stem}" for other in TRAINING if is_entry_point(other)}
    absolute = {("training" + source if source.startswith(".") else source, name) for source, name in imports(path)}
    imported = {source for source, _ in absolute} | {f"{source.rstrip('.')}.{name}" for source, name in absolute}
    assert imported & entry_points == set()


def test_no_module_is_a_drawer_for_everything() -> None:
    assert {path.stem for path in [*PACKAGE, *TRAINING]} & {"utils", "util", "misc", "helpers", "common"} == set()


@pytest.mark.parametrize("path", [*PACKAGE, *TRAINING, *TESTS], ids=names)
def test_nothing_is_longer_than_a_reader_can_hold(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGER.get(names(path), MOST_LINES["file"])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            name = f"{names(path)}: {node.name}"
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGER.get(name, MOST_LINES["function"]), name
