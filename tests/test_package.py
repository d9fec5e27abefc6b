"""The distributed package declares what it imports and contains the files that it needs."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from places import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")

SOURCE = ROOT / "src/dovetail"
NOT_IMPORTED_YET = {"datasets"}
"""Dependencies of the next release's tasks."""
IMPORTED_IN_FUNCTIONS = {"kernels.py"}
"""Modules that functions import where an optional package is installed."""
IMPORTED_BY_OPTUNA = {"greenlet"}
"""Optional there: its GPSampler is faster with it."""
DISTRIBUTIONS = packages_distributions()
"""Package -> the distributions that provide it."""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    """The distributions of a list of requirements, by their normalized names."""
    return {normalized(re.split(r"[\[<>=!~; ]", text, maxsplit=1)[0]) for text in requirements}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imports() -> Iterator[tuple[str, Path, bool]]:
    """Top-level name of each package imported in src, the file, and whether the import runs with the module."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        deferred = {id(n) for f in ast.walk(tree) if _is_deferred(f) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            else:
                continue
            for module in modules:
                top = module.partition(".")[0]
                if top != "dovetail" and top not in sys.stdlib_module_names:
                    yield top, path, id(node) not in deferred and path.name not in IMPORTED_IN_FUNCTIONS


def _is_deferred(node: ast.AST) -> bool:
    """Whether what is in it does not run with the module: a function, or what is only for types."""
    for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return for_types or isinstance(node, ast.FunctionDef)


def distribution(package: str) -> str:
    """The distribution that provides a package; "yaml" is provided by "pyyaml"."""
    found = [normalized(name) for name in DISTRIBUTIONS.get(package, [])]
    return normalized(package) if normalized(package) in found or not found else found[0]


def test_every_imported_package_is_a_dependency() -> None:
    needed = names(project()["project"]["dependencies"])
    extras = set().union(*map(names, project()["project"]["optional-dependencies"].values()))
    for package, path, at_import in imports():
        allowed = needed if at_import else needed | extras
        assert distribution(package) in allowed, f"{path.name} imports {package}, which pyproject.toml does not declare"


def test_every_dependency_is_imported() -> None:
    imported = {distribution(package) for package, _, _ in imports()} | NOT_IMPORTED_YET | IMPORTED_BY_OPTUNA
    assert names(project()["project"]["dependencies"]) <= imported


def test_package_data_covers_every_file_that_is_no_module() -> None:
    data = project()["tool"]["setuptools"]["package-data"]["dovetail"]
    covered = {path for pattern in data for path in SOURCE.glob(pattern)}
    for path in SOURCE.rglob("*"):
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
            assert path in covered, f"package-data does not cover {path.relative_to(SOURCE)}"
    for needed in ("py.typed", "__init__.pyi", "tasks/playground/model/model.safetensors"):
        assert SOURCE / needed in covered


def test_every_folder_of_modules_is_a_package() -> None:
    for path in SOURCE.rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent.relative_to(SOURCE)} has no __init__.py"
