"""README and docs name existing links, paths, modules, functions, options and targets of make; the map is whole."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import adpa

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
ROOMS = ("benchmarks", "data", "examples", "kernels", "lab", "pipeline", "src", "tests")
MAP = ROOT / "docs/architecture.md"
# Of every command, or beside them.
COMMON_OPTIONS = {"--config", "--debug", "--help", "--report", "--version", "--no-bf16", "--install-completion"}
OTHER_TOOLS = {  # torchrun, accelerate launch, docker run, sbatch
    "--nproc-per-node",
    *("--fsdp_version", "--num_processes", "--use_fsdp"),
    "--shm-size",
    "--array",
}

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(text: str) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def functions(*folders: str) -> Iterator[ast.FunctionDef]:
    """The functions of some folders of the repository."""
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield from (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef))


@cache
def options() -> set[str]:
    """The options of adpa's commands, which are the parameters of functions, and of the benchmarks."""
    commands = {"lab", *(name for name in adpa.__all__ if name.islower())}
    parameters = {
        argument.arg
        for function in functions("pipeline", "lab")
        if function.name in commands
        for argument in (*function.args.args, *function.args.kwonlyargs)
    }
    benchmarks = "\n".join(file.read_text() for file in (ROOT / "benchmarks").rglob("*.py"))
    assumptions = re.findall(r"^    (\w+): Annotated\[", benchmarks, re.MULTILINE)  # of benchmarks.costs
    declared = re.findall(r'"(--[a-z-]+)"', benchmarks)
    return {f"--{name.replace('_', '-')}" for name in (*parameters, *assumptions)} | {*declared}


def defines(file: Path, name: str) -> bool:
    """Whether a source has such a function, class or ``Class.method``."""
    source = file.read_text()
    return all(re.search(rf"^ *(?:def|class) {part}\b", source, re.MULTILINE) for part in name.split("."))


@documents
def test_every_link_leads_to_a_file_and_a_heading_in_it(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@documents
def test_links_of_the_site_stay_in_it(document: Path) -> None:
    """The site has the folder docs alone."""
    docs = ROOT / "docs"
    if document.is_relative_to(docs):
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose(document.read_text())):
            assert target.startswith("https://") or (document.parent / target).resolve().is_relative_to(docs), target


@documents
def test_every_path_in_a_document_is_there(document: Path) -> None:
    rooms = "|".join((*ROOMS, "docs"))
    text = re.sub(r"\[[^]]*\]\([^)]*\)", "", document.read_text())  # without links, which count from the document
    for path in re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w/-]*\.[a-z]+\b", text):
        assert (ROOT / path).is_file(), path


@documents
def test_every_module_and_its_function_is_there(document: Path) -> None:
    for dotted in set(re.findall(r"\b(?:adpa|benchmarks)(?:\.\w+)+", document.read_text())) - {"adpa.json"}:
        package, *parts = dotted.split(".")
        place = ROOT / "src/adpa" if package == "adpa" else ROOT / package
        while parts and (place / parts[0]).is_dir():
            place /= parts.pop(0)
        if not parts or (place == ROOT / "src/adpa" and parts[0] in adpa.__all__):
            continue
        file = place / f"{parts.pop(0)}.py"
        assert file.is_file(), dotted
        assert all(defines(file, name) for name in parts), dotted


@documents
def test_every_option_is_one_of_adpa_or_of_a_named_tool(document: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text()))
    assert named - options() - COMMON_OPTIONS - OTHER_TOOLS == set()


@documents
def test_every_target_of_make_is_there(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make\s+([a-z][a-z-]*)", document.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_readme_is_short_and_names_the_two_commands_of_a_newcomer() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert {"make demo", "make test"} <= {*lines}


def rooms_of_the_map() -> dict[str, list[str]]:
    """The files that the map lists, by their folder."""
    sections = re.findall(r"^### `([\w/]+)/`\n.*?^```\n(.*?)^```", MAP.read_text(), re.MULTILINE | re.DOTALL)
    return {folder: re.findall(r"^(\S+) ", lines, re.MULTILINE) for folder, lines in sections}


def test_the_map_has_every_source_file_once_with_a_line_about_it() -> None:
    listed = rooms_of_the_map()
    folders = {file.parent for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    in_map = {folder for folder in folders if folder.relative_to(ROOT).parts[0] not in ("tests", "examples")}
    assert {*listed} == {str(folder.relative_to(ROOT)) for folder in in_map}
    for folder, names in listed.items():
        files = [file.name for file in (ROOT / folder).iterdir() if file.suffix in (".py", ".yaml")]
        assert sorted(names) == sorted(files), folder
    assert "### `cli.py`" in MAP.read_text()


def test_every_step_of_the_way_is_a_function_of_the_file_beside_it() -> None:
    steps = re.findall(r"`([\w.]+)` (?:\||in) `([\w/]+\.py)`", MAP.read_text())
    assert len(steps) > 25
    assert [step for step in steps if not defines(ROOT / step[1], step[0])] == []
