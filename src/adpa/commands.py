"""From a function to a command: it takes its options, calls the function and shows the report or one line of error."""

import inspect
import os
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console, RenderableType
from typing_extensions import Doc

from adpa.data.cache.locations import Location, check_other_file, check_outside
from adpa.errors import AdpaError, ListedError, OptionError, did_you_mean
from adpa.parameters import as_argument, as_option, doc_of, group_of
from adpa.parser import path_of, print_error
from adpa.pipeline.models.launcher import this_rank
from adpa.pipeline.options import Group, PathOrName, kind_of
from adpa.pipeline.terminal.report import show_report
from adpa.summary_file import is_summary, summary_file
from adpa.values import read_value
from adpa.yaml_options import read_config

OUT_OF_MEMORY = "out of memory; lower --batch-tokens, --micro-batch-size or, with vLLM, --gpu-memory-utilization"
FILES_WRITTEN = ("report", "html")  # the options that name one


class Ended(SystemExit):
    """A scheduler, or a terminal that was closed, ends the programme by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def as_command(
    stage: Callable[..., Any],
    show: Callable[[Any], RenderableType] | None = None,
    arguments: Collection[str] = (),
    failure: Callable[[Any], str] | None = None,
    fixed: Mapping[str, Any] = {},  # only read
    after_stop: Callable[[Mapping[str, Any]], str] = lambda options: "",
) -> Callable[..., None]:
    """The command of a stage: its parameters as options, and what every command has beside them.

    Args:
        stage: the function.
        show: how its report looks in a terminal; default: a table of its fields.
        arguments: the parameters that have a place instead of a name.
        failure: what a report says is wrong, in one line that is printed below it, with exit code 1; empty for nothing.
        fixed: arguments of the stage that are no options: their parameters have no ``Doc``.
        after_stop: from the options, what a user who stopped the command can do next.
    """
    show = show or partial(show_report, stage.__name__)
    declared = [each for each in inspect.signature(stage).parameters.values() if doc_of(each)]
    declared.sort(key=lambda parameter: list(Group).index(group_of(parameter)))
    own = [*inspect.signature(_own_options).parameters.values()]
    keys = _summary_keys(stage)
    kinds = {parameter.name: kind_of(parameter) for parameter in [*declared, *own]}
    parameters = [as_argument(each) if each.name in arguments else as_option(each) for each in declared]
    parameters += [as_option(each, _read_config if each.name == "config" else None) for each in own]

    def command(config: Path | None, report: Path | None, debug: bool, **options: Any) -> None:
        done = None
        try:
            _check_folder()
            _check_files(kinds, options | {"config": config, "report": report}, keys)
            with summary_file(report) as write:
                done = stage(**options, **fixed)
                if this_rank() != 0:
                    return
                write(done)
                Console().print(show(done), crop=False)  # lines to copy stay whole
        except AdpaError as error:
            _fail(error, debug, error.exit_code)
        except (KeyboardInterrupt, Ended) as stop:
            word, code = ("stopped", stop.number) if isinstance(stop, Ended) else ("interrupted", signal.SIGINT)
            if this_rank() == 0:
                print_error("; ".join(filter(None, (word, after_stop(options)))))
            raise typer.Exit(128 + code) from stop
        except (OSError, RuntimeError) as error:
            if done is not None and isinstance(error, OSError):
                raise  # standard output cannot be written
            _fail(error, debug, 1, OUT_OF_MEMORY if type(error).__name__ == "OutOfMemoryError" else "")
        except Exception as error:  # the last resort, so that nobody is shown a traceback unasked
            _fail(error, debug, 1, f"{type(error).__name__}: {' '.join(str(error).split())}; --debug shows more")
        if failure is not None and (problem := failure(done)):
            print_error(problem)
            raise typer.Exit(1)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = (inspect.getdoc(stage) or "").partition("\n\nRaises:")[0].partition("\n\nArgs:")[0]
    return command


def _own_options(
    config: Annotated[Path | None, Doc("YAML file of options; the command line overrides it."), Group.OTHER] = None,
    report: Annotated[Path | None, Doc("File for the summary as JSON; - is standard output."), Group.OTHER] = None,
    debug: Annotated[bool, Doc("Show the traceback of an error."), Group.OTHER] = False,
) -> None:
    """The options that every command has."""


def _summary_keys(stage: Callable[..., Any]) -> frozenset[str]:
    """The keys of a command's summary; none if its class is imported only when the command runs."""
    returned = inspect.signature(stage).return_annotation
    reports = [each for each in get_args(returned) or [returned] if is_dataclass(each)]
    return frozenset(field.name for report in reports for field in fields(report))


def _check_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise OptionError("the working directory was removed", "cd to one that is there") from error


def _check_files(kinds: Mapping[str, Any], options: Mapping[str, Any], keys: frozenset[str]) -> None:
    """Checks that no file that is written is also read, or lies in a cache.

    A summary in the folder of a model, or of a run, may be replaced by the next one.
    """
    folders = (PathOrName, Path) if keys else (PathOrName,)
    given = {name: value for name, value in options.items() if value is not None and name in kinds}
    for name, value in given.items():
        if kinds[name] is Path and name != "report" and str(value) == "-":
            raise OptionError(f"--{name} -: not a file", "write ./- for a file of this name")
    for written in (name for name in FILES_WRITTEN if name in given):
        option, file = f"--{written}", given[written]
        for name, value in _each(given):
            if kinds[name] == Location:
                check_outside(option, file, value)
            elif name != written and kinds[name] in (Path, PathOrName) and "://" not in str(value):
                other = f"--{name.replace('_', '-')}"
                is_kept = kinds[name] in folders and not is_summary(file, keys)
                check_other_file(option, file, other, Path(value), is_read=is_kept)


def _each(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values; an option that repeats has each of its values."""
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            yield name, one


def _read_config(context: typer.Context, text: str | None) -> Path | None:
    """Reads a file of options; what the command line lacks is taken from it."""
    if text is None:
        return None
    path: Path = read_value("--config", Path, text)
    where, command = f"--config {path}", path_of(context)
    content = read_config("--config", path)
    written = Counter(name.replace("-", "_") for name in content)
    if twice := [name for name, count in written.items() if count > 1]:
        raise OptionError(f"{where}: {twice[0]!r} is there twice", "remove one")
    known = {parameter.name: parameter for parameter in context.command.params}
    options = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name == "config":
            raise OptionError(f"{where}: {key}: a file of options names no other one", "write its options here")
        if name not in known:
            names = [one.replace("_", "-") for one in known]
            raise OptionError(
                f"{where}: {command} has no option {key!r}",
                did_you_mean(key.replace("_", "-"), names) or f"see {command} --help",
            )
        if value is None:
            raise OptionError(f"{where}: {key} has no value", "write one, or remove the line")
        several = getattr(known[name], "multiple", False)
        options[name] = [value] if several and not isinstance(value, list) else value
    context.default_map = options
    return path


def _fail(error: BaseException, debug: bool, exit_code: int, message: str = "") -> None:
    if debug:
        raise error
    text, *listed = str(error).splitlines() if isinstance(error, ListedError) else [" ".join(str(error).split())]
    print_error(message or text or type(error).__name__, *listed)
    raise typer.Exit(exit_code)
