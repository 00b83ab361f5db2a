"""The house: links resolve, no room imports upward, and heavy or optional packages stay in one module."""

import ast
import tomllib
from pathlib import Path

import pytest

import adpa

ROOT = Path(__file__).parent.parent
LINKS = ("data", "kernels", "lab", "pipeline", "cli.py")
BASE = {"errors", "progress", "yaml_options"}  # beside the links of src/adpa; every room may import them

# What a room may import of adpa: whole rooms, without the rooms in them, or single modules. The flow has one direction.
# A module may have a rule of its own.
OPTIONS = {"pipeline.options", "pipeline.option_checks"}
CACHE_FILES = {"data", "data.cache"}
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": {"kernels"},
    "data": {"data", "data.cache"},
    "data.sequences": set(),
    "data.vocabulary": set(),
    "data.cache": {"data.cache", "data.sequences"},
    "data.cache.tokenizers": {"data.cache", "data.vocabulary"},
    "pipeline.terminal": {"pipeline.terminal", "pipeline.cache", *CACHE_FILES}
    | {f"pipeline.{command}" for command in ("precompute", "distill", "evaluate", "inspect", "runs", "inspected_runs")}
    | {"pipeline.scoring.probe", "pipeline.scoring.first_example", "pipeline.training.distill_plan"}
    | {"pipeline.training.serving", "pipeline.training.evaluation_numbers"},
    "pipeline.cache": {"pipeline.cache", *OPTIONS, *CACHE_FILES},
    "pipeline.models": {"pipeline.models", *OPTIONS, "kernels", *CACHE_FILES},
    "pipeline.scoring": {
        "pipeline.scoring",
        "pipeline.models",
        "pipeline.option_checks",
        "pipeline.options",
        "kernels",
        *CACHE_FILES,
    },
    "pipeline.training": {
        "pipeline.training",
        "pipeline.models",
        "pipeline.option_checks",
        "pipeline.options",
        "kernels",
        *CACHE_FILES,
    },
    "pipeline": {"pipeline", "pipeline.scoring", "pipeline.training", "pipeline.models", "pipeline.terminal"}
    | {"kernels", *CACHE_FILES},
    "lab": {"lab", "pipeline", "pipeline.models", "pipeline.training", "kernels", *CACHE_FILES},
    "cli": {"commands", "parser", "lab", "pipeline", "pipeline.cache", "pipeline.terminal"},
}
OWN_MODULE_ONLY = ("vllm", "ray", "peft", "bitsandbytes", "trl")
MODEL_PACKAGES = ("torch", "transformers")  # no room of files imports them
MOST_LINES, MOST_STATEMENTS = 400, 80  # of a file; of a function, in lines


def modules() -> list[Path]:
    return [file for room in LINKS for file in sorted((ROOT / room).rglob("*.py"))] + [ROOT / "cli.py"]


def product() -> list[Path]:
    """The modules, and the files beside them that are held to the same lengths."""
    others = [file for folder in ("benchmarks", "src/adpa") for file in (ROOT / folder).rglob("*.py")]
    return modules() + sorted(file for file in others if file.resolve() not in modules())


def room_of(file: Path) -> str:
    """``pipeline/scoring/jobs.py`` is in ``pipeline.scoring``; ``cli.py`` is a room of its own."""
    parts = file.relative_to(ROOT).parts
    return ".".join(parts[:-1]) or file.stem


def module_of(file: Path) -> str:
    """``pipeline/scoring/jobs.py`` is ``pipeline.scoring.jobs``."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def imports(source: str, typing: bool = True) -> set[str]:
    """The modules that a source imports, wherever in it; without ``typing`` not those for types alone."""
    names = set()
    tree = ast.parse(source)
    if not typing:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "adpa":
            names |= {f"adpa.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def upward(module: str, source: str) -> set[str]:
    """The imports of a source that the rule of its module, or else of its room, does not allow."""
    rule = module if module in MAY_IMPORT else module.rpartition(".")[0]
    names = imports(source)
    if hidden := {name for name in names if name == "adpa" or name.startswith(".")}:
        return hidden  # of these nobody sees to which room they lead
    own = {name.removeprefix("adpa.") for name in names if name.startswith("adpa.")}
    allowed = MAY_IMPORT[rule] | BASE
    return {name for name in own if name not in allowed and name.rpartition(".")[0] not in allowed}


@pytest.mark.parametrize("room", LINKS)
def test_every_room_is_linked_into_the_package(room: str) -> None:
    link = ROOT / "src" / "adpa" / room
    assert link.is_symlink()
    assert link.resolve() == ROOT / room


def test_a_wheel_has_every_room_and_every_file_in_it() -> None:
    """The packages are listed by name, so that a checkout without its links does not build."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = sorted({room_of(file) for file in modules()} - {"cli"})
    assert setuptools["packages"] == ["adpa", *(f"adpa.{room}" for room in folders)]
    for room in folders:
        patterns = ["*.py", *setuptools["package-data"].get(f"adpa.{room}", [])]
        files = [file for file in (ROOT / room.replace(".", "/")).iterdir() if file.is_file()]
        assert [file for file in files if not any(map(file.match, patterns))] == []


def long_functions(source: str) -> dict[str, int]:
    """The functions with more lines of statements than allowed; signatures, docstrings and Triton kernels are free."""
    long = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "triton.jit" not in map(
            ast.unparse, node.decorator_list
        ):
            statements = node.body[ast.get_docstring(node) is not None :]
            lines = (node.end_lineno or 0) - statements[0].lineno + 1 if statements else 0
            if lines > MOST_STATEMENTS:
                long[node.name] = lines
    return long


@pytest.mark.parametrize("file", product(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file: Path) -> None:
    source = file.read_text()
    assert source.count("\n") <= MOST_LINES
    assert long_functions(source) == {}


def test_a_long_function_is_seen() -> None:
    body = "    x = 0\n" * MOST_STATEMENTS
    allowed = f'def f(\n    a,\n    b,\n):\n    """One.\n\n    Two.\n    """\n{body}'
    assert long_functions(allowed) == {}
    assert long_functions(f"{allowed}    x = 0\n") == {"f": MOST_STATEMENTS + 1}
    assert long_functions(f"@triton.jit\n{allowed}    x = 0\n") == {}


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_imports_upward(file: Path) -> None:
    assert upward(module_of(file), file.read_text()) == set()


@pytest.mark.parametrize(
    ("room", "module"),
    [
        ("data", "pipeline.precompute"),
        ("data.vocabulary", "data.cache.shards"),
        ("data.cache", "data.batches"),
        ("data.cache.shards", "data.vocabulary"),
        ("kernels", "data.batches"),
        ("pipeline.models", "pipeline.scoring.engine"),
        ("pipeline.scoring", "pipeline.training.trainer"),
        ("pipeline.training", "pipeline.scoring.score"),
        ("pipeline.training", "pipeline.distill"),
        ("pipeline.cache", "pipeline.models.checkpoint"),
        ("pipeline.terminal", "pipeline.training.trainer"),
        ("pipeline", "cli"),
        ("pipeline", "lab.demo"),
        ("lab", "cli"),
    ],
)
def test_an_import_that_goes_upward_is_seen(room: str, module: str) -> None:
    package, _, name = module.rpartition(".")
    for line in (f"import adpa.{module}", f"def late():\n    from adpa.{module} import anything"):
        assert upward(room, line) == {module}
    if package:
        assert upward(room, f"from adpa.{package} import {name}") == {package}


@pytest.mark.parametrize("line", ["import adpa", "from adpa import distill", "from ..pipeline import distill"])
def test_an_import_that_hides_its_room_is_seen(line: str) -> None:
    assert upward("kernels", line)


@pytest.mark.parametrize("room", ["data.cache", "pipeline.cache", "pipeline.terminal"])
@pytest.mark.parametrize("package", MODEL_PACKAGES)
def test_rooms_of_files_import_no_model(room: str, package: str) -> None:
    files = (ROOT / room.replace(".", "/")).glob("*.py")
    assert [
        file for file in files if package in {name.split(".")[0] for name in imports(file.read_text(), False)}
    ] == []


@pytest.mark.parametrize("name", OWN_MODULE_ONLY)
def test_an_optional_package_is_imported_by_one_module_at_most(name: str) -> None:
    users = [file for file in modules() if name in {used.split(".")[0] for used in imports(file.read_text())}]
    product = [file.name for file in users if room_of(file) != "lab"]  # the laboratory compares with it
    assert len(product) <= 1, product


def test_no_room_is_a_regular_package() -> None:
    rooms = {file.parent for file in modules()} - {ROOT}
    assert not [room for room in rooms if (room / "__init__.py").exists()]


def test_the_stages_are_functions_of_the_package() -> None:
    assert set(adpa.__all__) >= {"precompute", "distill", "evaluate"}
    assert all(callable(getattr(adpa, name)) for name in adpa.__all__)
