"""The two lines that serve a student and chat with it. Imports no torch."""

import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants

OF_SERVING = ("openai", "pydantic", "uvicorn", "fastapi", "starlette")  # the packages of transformers[serving]


def vllm_lines(student: str) -> list[str]:
    """The lines for vLLM; the second one asks the server for the model's name."""
    return [f"vllm serve {shlex.quote(student)}", "vllm chat"]


def transformers_lines(student: str) -> list[str]:
    """The lines for transformers, which needs its extra ``serving``."""
    return [f"transformers {verb} {shlex.quote(student)}" for verb in ("serve", "chat")]


def serving_lines(student: str) -> list[str]:
    """The lines that work in this environment: for vLLM where it is installed, else for transformers.

    A line before them installs what is missing.
    """
    try:
        distribution("vllm")  # its program needs this name; other builds of vLLM have the module alone
    except PackageNotFoundError:
        missing = [package for package in OF_SERVING if find_spec(package) is None]
        install = [_found("pip install 'transformers[serving]'")] if missing else []
        serve, chat = map(_found, transformers_lines(student))
        offline = "HF_HUB_OFFLINE=0 " if constants.HF_HUB_OFFLINE else ""  # else it would not ask localhost either
        return [*install, serve, offline + chat]
    return [_found(line) for line in vllm_lines(student)]


def _found(line: str) -> str:
    """A line whose program is found although its environment is not activated."""
    program, _, rest = line.partition(" ")
    here = Path(sys.executable).with_name(program)
    return line if shutil.which(program) or not here.exists() else f"{shlex.quote(str(here))} {rest}"
