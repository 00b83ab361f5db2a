"""From a function to a command: it takes its options, calls the function and shows the report or one line of error."""

import dataclasses
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core
from rich.console import Console, RenderableType
from rich.markup import escape

from adpa.data.cache.locations import check_writable_file, find_location
from adpa.errors import AdpaError, ListedError, OptionError
from adpa.parameters import NO_VALUE, as_argument, as_option, group_of, has_doc, is_location
from adpa.pipeline.models.launcher import this_rank
from adpa.pipeline.options import Group
from adpa.pipeline.terminal.report import show_report
from adpa.yaml_options import read_options

MARKUP: Literal["rich"] = "rich"  # groups of options need a mode
OUT_OF_MEMORY = "out of memory; lower --batch-tokens, --micro-batch-size or, with vLLM, --gpu-memory-utilization"


class Command(typer.core.TyperCommand):
    """A command whose usage names its arguments plainly, without the braces that elsewhere mean a choice."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces of the line of usage."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``, in the last group."""
        option: Any = super().get_help_option(ctx)
        option.rich_help_panel, option.metavar = Group.OTHER, NO_VALUE
        return option


class Commands(typer.core.TyperGroup):
    """Commands that are imported when they are called: nobody waits for torch to be told how a command is spelled.

    What is registered is a function that gives the command; its docstring is what the group's help says of it.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, and the rest of the arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(command), rest


def load(command: Any) -> Any:
    """The command that a registered function gives; a group as it is.

    Its help is the first paragraph of its docstring, then the options, then the other paragraphs: the first screen
    shows the options that must be decided.
    """
    if isinstance(command, Commands):
        return command
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=MARKUP)
    function = command.callback()  # the registered function, which imports the stage and gives its command
    first, *details = [" ".join(paragraph.split()) for paragraph in escape(function.__doc__).split("\n\n")]
    single.command(command.name, cls=Command, help=first, epilog="\n\n".join(details))(function)
    return typer.main.get_command(single)


def as_command(
    stage: Callable[..., Any],
    show: Callable[[Any], RenderableType] | None = None,
    arguments: Collection[str] = (),
    failure: Callable[[Any], str] | None = None,
    fixed: Mapping[str, Any] = {},  # only read
) -> Callable[..., None]:
    """The command of a stage: its parameters as options, and what every command has beside them.

    Args:
        stage: the function.
        show: how its report looks in a terminal; default: a table of its fields.
        arguments: the parameters that have a place instead of a name.
        failure: what a report says is wrong, in one line that is printed below it, with exit code 1; empty for nothing.
        fixed: arguments of the stage that are no options: their parameters have no ``Doc``.
    """
    show = show or partial(show_report, stage.__name__)
    declared = [each for each in inspect.signature(stage).parameters.values() if has_doc(each)]
    locations = {parameter.name for parameter in declared if is_location(parameter)}
    parameters = [
        as_argument(parameter) if parameter.name in arguments else as_option(parameter)
        for parameter in sorted(declared, key=lambda parameter: list(Group).index(group_of(parameter)))
    ]

    def command(
        *,
        config: Annotated[
            Path | None,
            typer.Option(
                help="YAML file of options; the command line overrides it.",
                callback=_read_config,
                is_eager=True,
                rich_help_panel=Group.OTHER,
            ),
        ] = None,
        report: Annotated[
            Path | None, typer.Option(help="File for the summary as JSON.", rich_help_panel=Group.OTHER)
        ] = None,
        debug: Annotated[
            bool,
            typer.Option(
                "--debug", help="Show the traceback of an error.", metavar=NO_VALUE, rich_help_panel=Group.OTHER
            ),
        ] = False,
        **options: Any,
    ) -> None:
        try:
            if report is not None:
                check_writable_file("--report", report)
            options |= {name: find_location(options[name]) for name in locations if options[name] is not None}
            done = stage(**options, **fixed)
            if this_rank() != 0:
                return
            if report is not None:
                report.write_text(json.dumps(dataclasses.asdict(done), indent=2) + "\n")
        except AdpaError as error:
            _fail(error, debug, error.exit_code)
        except (OSError, RuntimeError) as error:
            _fail(error, debug, 1, OUT_OF_MEMORY if type(error).__name__ == "OutOfMemoryError" else "")
        except Exception as error:  # the last resort, so that nobody is shown a traceback unasked
            _fail(error, debug, 1, f"{type(error).__name__}: {' '.join(str(error).split())}; --debug shows more")
        Console().print(show(done))
        if failure is not None and (problem := failure(done)):
            print_error(problem)
            raise typer.Exit(1)

    own = [p for p in inspect.signature(command).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    command.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *own]}
    command.__doc__ = (inspect.getdoc(stage) or "").partition("\n\nRaises:")[0].partition("\n\nArgs:")[0]
    return command


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        content = read_options("--config", path)
        if not isinstance(content, dict):
            raise OptionError(f"--config {path}: expected a mapping of options to values")
        written = Counter(name.replace("-", "_") for name in content)
        if twice := [name for name, count in written.items() if count > 1]:
            raise OptionError(f"--config {path}: {twice[0]!r} is there twice")
        options = {name.replace("-", "_"): value for name, value in content.items()}
        known = {parameter.name: parameter for parameter in context.command.params}
        unknown = sorted(options.keys() - known.keys())
        if unknown:
            raise OptionError(f"--config {path}: {context.info_name} has no option {unknown[0]!r}")
        for name, value in options.items():
            if getattr(known[name], "multiple", False) and not isinstance(value, list):
                options[name] = [value]
    except OptionError as error:
        _fail(error, debug=False, exit_code=2)
    context.default_map = options
    return path


def _fail(error: BaseException, debug: bool, exit_code: int, message: str = "") -> None:
    if debug:
        raise error
    line = str(error) if isinstance(error, ListedError) else " ".join(str(error).split())
    text = message or line or type(error).__name__
    print_error(text)
    raise typer.Exit(exit_code)


def print_error(text: str) -> None:
    """One line on standard error; of an error with a list, several."""
    sys.stderr.write(f"adpa: {text}\n")  # at once, because ranks share it
