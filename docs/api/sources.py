"""The site's API pages: mkdocs calls ``on_config`` before it builds, griffe calls the extensions.

Inside a package griffe skips folders without ``__init__.py``, and the rooms of adpa have none. So it reads a copy with
these files.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import griffe
from mkdocs.plugins import event_priority

COPY = TemporaryDirectory(prefix="adpa-site-")  # removed when mkdocs ends


@event_priority(100)  # before mkdocstrings, which takes the paths
def on_config(config: Any) -> Any:
    """Copies the package, links followed, and adds what griffe asks for."""
    package = Path(COPY.name) / "adpa"
    source = Path(config.config_file_path).parent / "src/adpa"
    shutil.copytree(source, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in package.rglob("*/"):
        (folder / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [COPY.name]
    return config


class SharedOptions(griffe.Extension):
    """Before griffe_typingdoc: the name of a shared option becomes its ``Annotated[type, Doc("help")]``."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Visits the parameters of the commands."""
        for parameter in parameters(pkg):
            name = parameter.annotation
            if isinstance(name, griffe.ExprName) and name.canonical_path.startswith("adpa.pipeline.options."):
                parameter.annotation = loader.modules_collection[name.canonical_path].value


class PlainTypes(griffe.Extension):
    """After griffe_typingdoc, which has taken the help: ``Annotated[type, …]`` becomes the type."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Visits the parameters of the commands, and those of their docstrings."""
        for parameter in parameters(pkg):
            parameter.annotation = plain(parameter.annotation)
        for function in commands(pkg):
            for section in function.docstring.parsed if function.docstring else []:
                if section.kind is griffe.DocstringSectionKind.parameters:
                    for described in section.value:
                        described.annotation = plain(described.annotation)


def commands(package: griffe.Module) -> Iterator[griffe.Function]:
    """The functions of adpa.pipeline, those of its rooms included."""
    rooms = [package["pipeline"]] if package.path == "adpa" else []
    while rooms:
        room = rooms.pop()
        rooms += room.modules.values()
        yield from room.functions.values()


def parameters(package: griffe.Module) -> Iterator[griffe.Parameter]:
    """Their parameters."""
    for function in commands(package):
        yield from function.parameters


def plain(annotation: Any) -> Any:
    """The type in an ``Annotated``; anything else as it is."""
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Annotated":
        return annotation.slice.elements[0]
    return annotation
