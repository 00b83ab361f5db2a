"""Python code that lies beside the weights of a model: which files are run, and what is refused."""

import sys
from pathlib import Path
from typing import Any

from adpa.errors import ModelError
from adpa.pipeline.models.weight_files import CONFIG, read_json

AUTO_CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")  # the last one is what vLLM runs


def code_files(name: str, directory: Path) -> list[Path]:
    """The Python files that transformers runs to load a model: those that config.json names, and what they import.

    Raises:
        ModelError: config.json names code that is not there, or that lies in another repository, which may change.
    """
    files = set[Path]()
    for auto_class in AUTO_CLASSES:
        if (file := _named_file(name, directory, auto_class)) is not None:
            files |= _with_imports(name, file)
    return sorted(files)


def check_own_code(name: str, directory: Path, model: Any) -> None:
    """Checks that a model runs the code beside its weights.

    transformers takes the class that it first saw with a configuration. Two directories of one name may have the same
    configuration's code, and other code of the model.

    Raises:
        ModelError: it runs other code.
    """
    file = _named_file(name, directory, "AutoModelForCausalLM")
    if file is None:
        return
    folder = Path(str(sys.modules[type(model).__module__].__file__)).parent
    for each in _with_imports(name, file):
        run = folder / each.name
        if not run.is_file() or run.read_bytes() != each.read_bytes():
            raise ModelError(
                f"{name}: transformers has loaded other code from another directory of the same name",
                "rename one of the two directories",
            )


def _named_file(name: str, directory: Path, auto_class: str) -> Path | None:
    """The file with the class that config.json names for a class of transformers; None if it names none."""
    auto_map = read_json(name, directory / CONFIG).get("auto_map")
    reference = auto_map.get(auto_class) if isinstance(auto_map, dict) else None
    if reference is None:
        return None
    repository, _, own = str(reference).rpartition("--")
    if repository:
        raise ModelError(
            f"{name}: its code lies in another repository, {repository}, and may change there",
            f"copy its .py files beside the weights, and take {repository}-- out of the auto_map in {CONFIG}",
        )
    module = own.partition(".")[0]
    if not isinstance(reference, str) or own.count(".") != 1 or not (directory / f"{module}.py").is_file():
        raise ModelError(
            f"{name}: its {CONFIG} names the code {reference!r}, and found no {module}.py", "complete the checkpoint"
        )
    return directory / f"{module}.py"


def _with_imports(name: str, file: Path) -> set[Path]:
    from transformers.dynamic_module_utils import get_relative_import_files  # imports torch

    try:
        return {file, *map(Path, get_relative_import_files(file))}
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ModelError(f"{name}: its code imports {missing}, which is missing", "complete the checkpoint") from error
