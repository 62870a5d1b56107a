"""The house keeps its shape: imports go one way, and each root folder is linked, not copied."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "inlay"
FOLDERS = ("passes", "backends", "lowering", "runtime", "bench")

# What each part may import of inlay; everything may import inlay.errors, the foundation.
MAY_IMPORT = {
    "passes": {"passes"},
    "backends": {"passes", "backends"},
    "lowering": {"passes", "backends", "lowering"},
    "runtime": {"passes", "backends", "runtime"},
}
# The command line alone may use bench; lowering asks the face for the package's version.
FACE_MODULES = {"errors", "__version__"}


def imported_parts(path: Path) -> set[str]:
    """First names after `inlay.` of all imports in a file, lazy ones included."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "inlay":
                names = [f"inlay.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        assert getattr(node, "level", 0) == 0, f"{path}:{node.lineno} is a relative import"
        parts |= {name.split(".")[1] for name in names if name.startswith("inlay.")}
    return parts


@pytest.mark.parametrize("folder", FOLDERS)
def test_root_folder_is_linked_into_the_package(folder: str) -> None:
    link = PACKAGE / folder
    assert link.resolve() == (ROOT / folder).resolve()
    if (ROOT / folder).is_dir() and (ROOT / ".git").exists():
        assert link.is_symlink()


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_go_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): extra
        for path in files
        if (extra := imported_parts(path) - MAY_IMPORT[folder] - FACE_MODULES)
    }
    assert not wrong


def test_errors_is_the_foundation() -> None:
    assert not imported_parts(PACKAGE / "errors.py")


def test_only_the_command_line_imports_bench() -> None:
    files = [
        path
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in (*FOLDERS, "cli")
    ]
    assert files
    assert not [path for path in files if "bench" in imported_parts(path)]
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            assert "bench" not in imported_parts(path), path


def test_an_import_the_wrong_way_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def late():\n    from inlay.runtime.executor import Executor\n")
    assert imported_parts(wrong) - MAY_IMPORT["passes"] == {"runtime"}
