"""The types of options in Python, which has no parser: paths may be text, and a word is no truth value."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from typing_extensions import Doc
from upath import UPath

import adpa
from adpa.data.cache.locations import Location
from adpa.errors import AdpaError, OptionError
from adpa.pipeline.option_checks import takes_options
from adpa.pipeline.options import PathOrName


@takes_options
def stage(
    model: Annotated[PathOrName, Doc("A model.")] = "S",
    cache: Annotated[Location | None, Doc("A cache.")] = None,
    output: Annotated[Path, Doc("A folder.")] = Path("runs"),
    share: Annotated[str | None, Doc("A share or a name.")] = None,
    names: Annotated[list[str] | None, Doc("Names.")] = None,
    folders: Annotated[list[Path] | None, Doc("Folders.")] = None,
    code: Annotated[bool, Doc("A switch.")] = False,
) -> dict[str, Any]:
    """Returns what it got."""
    return dict(locals())


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("output", "runs/x", Path("runs/x")),
        ("cache", "CACHE", Path("CACHE")),
        ("cache", "s3://bucket/cache", UPath("s3://bucket/cache")),
        ("cache", None, None),
        ("model", Path("models/S"), "models/S"),
        ("share", 0.1, "0.1"),
        ("folders", ["a", Path("b")], [Path("a"), Path("b")]),
        ("code", True, True),
    ],
)
def test_a_path_may_be_text_and_text_a_path_or_a_number(name: str, given: Any, taken: Any) -> None:
    assert stage(**{name: given})[name] == taken


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("code", "no", "--code 'no'; expected True or False"),
        ("code", 1, "--code 1; expected True or False"),
        ("names", "chosen", "--names 'chosen'; expected a list of texts; write ['chosen']"),
        ("names", {"seed": 1}, "--names {'seed': 1}; expected a list of texts"),
        ("model", ["S"], "--model ['S']; expected text"),
        ("share", True, "--share True; expected text"),
        ("output", 3, "--output 3; expected a path"),
        ("output", None, "--output None: not a value; write one, or leave the option out"),
        ("cache", " ", "--cache ' ': an empty value; write one, or leave the option out"),
    ],
)
def test_another_type_is_refused_by_the_name_of_the_option(name: str, given: Any, message: str) -> None:
    with pytest.raises(OptionError) as refused:
        stage(**{name: given})
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: adpa.distill("dckd", "S", folder, folder + "/run", trust_remote_code="no"),  # type: ignore
        lambda folder: adpa.precompute("T", "d.jsonl", folder, trust_remote_code="no"),  # type: ignore
        lambda folder: adpa.evaluate("S", "S", "T", "R", "d.jsonl", trust_remote_code="no"),  # type: ignore
    ],
)
def test_a_word_is_no_permission_to_run_code(call: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--trust-remote-code 'no'; expected True or False$"):
        call(str(tmp_path))


def test_commands_on_a_folder_take_its_name(tmp_path: Path) -> None:
    for command in (adpa.list_runs, adpa.list_cache, adpa.inspect_cache):
        with pytest.raises(AdpaError, match="none: "):
            command(str(tmp_path / "none"))  # type: ignore[arg-type]
