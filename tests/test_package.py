"""The house: links resolve, nothing imports upward, and heavy or optional packages stay in their own room."""

import ast
import tomllib
from pathlib import Path

import pytest

import adpa

ROOT = Path(__file__).parent.parent
ROOMS = ("data", "kernels", "lab", "pipeline", "cli.py")
# What a room may import of adpa; the flow has one direction.
MAY_IMPORT = {
    "kernels": {"errors", "kernels"},
    "data": {"errors", "data"},
    "pipeline": {"errors", "data", "kernels", "pipeline"},
    "cli.py": {"commands", "errors", "lab", "pipeline"},
    "lab": {"errors", "data", "kernels", "pipeline", "lab"},
}
OWN_ROOM_ONLY = ("vllm", "ray", "peft", "bitsandbytes", "trl")


def modules() -> list[Path]:
    return [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))] + [ROOT / "cli.py"]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_linked_into_the_package(room: str) -> None:
    link = ROOT / "src" / "adpa" / room
    assert link.is_symlink()
    assert link.resolve() == ROOT / room


def test_a_wheel_has_every_room_and_every_file_in_it() -> None:
    """The packages are listed by name, so that a checkout without its links does not build."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"] == ["adpa", *(f"adpa.{room}" for room in ROOMS if not room.endswith(".py"))]
    for room in ROOMS:
        patterns = ["*.py", *setuptools["package-data"].get(f"adpa.{room}", [])]
        files = [file for file in (ROOT / room).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        assert [file for file in files if not any(map(file.match, patterns))] == []


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_imports_upward(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    used = {name.split(".")[1] for name in imports(file) if name.startswith("adpa.")}
    assert used <= MAY_IMPORT[room]


@pytest.mark.parametrize("name", OWN_ROOM_ONLY)
def test_an_optional_package_is_imported_by_one_module_at_most(name: str) -> None:
    users = [file for file in modules() if any(found.split(".")[0] == name for found in imports(file))]
    product = [file.name for file in users if file.parent.name != "lab"]  # the laboratory compares with it
    assert len(product) <= 1, product


def test_no_room_is_a_regular_package() -> None:
    assert not [room for room in ROOMS if (ROOT / room / "__init__.py").exists()]


def test_the_stages_are_functions_of_the_package() -> None:
    assert set(adpa.__all__) >= {"precompute", "distill", "evaluate"}
    assert all(callable(getattr(adpa, name)) for name in adpa.__all__)
