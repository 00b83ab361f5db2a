"""Reads the command line: commands are imported when they are called; errors of one line; the help."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from textwrap import TextWrapper
from typing import Any, Literal

import typer
import typer.core
from rich.console import Console
from rich.markup import escape

from adpa.errors import AdpaError, did_you_mean
from adpa.pipeline.options import Group

MARKUP: Literal["rich"] = "rich"  # groups of options need a mode
NO_VALUE = ""  # what a switch takes
HELP = {"help_option_names": ["-h", "--help"]}
SHORT = 60  # characters of a line of help
NARROW = 80  # columns below which the help has no boxes
UsageError: Any = typer.BadParameter.__mro__[1]  # what the parser raises; typer has no public name for it


def print_error(text: str, *listed: str) -> None:
    """One line on standard error, and below it a list, one a line."""
    lines = [f"adpa: {_as_line(text)}", *(f"  {_as_line(each)}" for each in listed)]
    with suppress(OSError):  # the exit code tells it too
        sys.stderr.write("\n".join(lines) + "\n")  # at once, because ranks share it


def _as_line(text: str) -> str:
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class Command(typer.core.TyperCommand):
    """A command that says at once what it lacks."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Reads the arguments; without any, shows what is required."""
        if ctx.resilient_parsing:  # a shell completes the line
            return super().parse_args(ctx, args)
        if not args and any(option.required for option in self.params):
            sys.stderr.write(_show_required(self, ctx))
            raise typer.Exit(2)
        debug = "--debug" in args
        try:
            return self._parse(ctx, args, list(args))
        except AdpaError as error:
            if debug:
                raise
            print_error(str(error))
            raise typer.Exit(error.exit_code) from error

    def _parse(self, ctx: Any, args: list[str], written: list[str]) -> Any:
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            error.ctx = ctx
            if getattr(error, "param", None) is not None and error.param.required:
                values, _, _ = self.make_parser(ctx).parse_args(args=written)
                missing = [one for one in self.params if one.required and one.consume_value(ctx, values)[0] is None]
                if error.param in missing:
                    for one in (one for one in self.params if one not in missing):
                        one.handle_parse_result(ctx, values, [])  # a wrong value is told first
                    raise UsageError(f"{_listing(map(_name, missing))} missing", ctx) from error
            if getattr(error, "option_name", "").startswith("-"):
                error.option_name = _as_written(error.option_name, written)
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces of the line of usage, without the braces that elsewhere mean a choice."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``, in the last group."""
        option: Any = super().get_help_option(ctx)
        option.rich_help_panel, option.metavar = Group.OTHER, NO_VALUE
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Shows the help; in a narrow terminal every option has lines of its own."""
        if (columns := Console().width) < NARROW:
            typer.echo(_narrow_help(self, ctx, columns))
        else:
            super().format_help(ctx, formatter)


class Commands(typer.core.TyperGroup):
    """Commands that are imported when they are called: nobody waits for torch to be told how a command is spelled.

    What is registered is a function that gives the command; its docstring is what the group's help says of it.
    """

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Reads the arguments before the command's name."""
        if extra.get("resilient_parsing"):  # a shell completes the line
            return super().make_context(*args, **extra)
        with _one_line():
            return super().make_context(*args, **extra)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Reads the options of the group."""
        if not args and not ctx.resilient_parsing:
            raise UsageError(f"a command is missing: {', '.join(self.commands)}", ctx)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, and the rest of the arguments."""
        if ctx.resilient_parsing and args[0] not in self.commands:
            return None, None, []
        if args[0] not in self.commands:
            fix = did_you_mean(args[0].lower(), self.commands)
            raise UsageError("; ".join(filter(None, (f"no command {args[0]!r}", fix))), ctx)
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(command), rest

    def invoke(self, ctx: Any) -> Any:
        """Calls a command."""
        with _one_line():
            return super().invoke(ctx)

    def get_params(self, ctx: Any) -> Any:
        """The options of the group; those that typer adds for shells take no value."""
        options = super().get_params(ctx)
        for option in options:
            if option.name in ("install_completion", "show_completion"):
                option.metavar = NO_VALUE
        return options

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``."""
        option: Any = super().get_help_option(ctx)
        option.metavar = NO_VALUE
        return option


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


@contextmanager
def _one_line() -> Iterator[None]:
    """Ends the programme with one line where the command line cannot be parsed."""
    try:
        yield
    except UsageError as error:
        print_error(_describe(error))
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        print_error("interrupted")
        raise typer.Exit(130) from error


def _describe(error: Any) -> str:
    """What the parser says, in the form of our own errors."""
    command = path_of(error.ctx) if error.ctx else "adpa"
    text, fix = error.format_message().strip().rstrip("."), f"see {command} --help"
    if option := getattr(error, "option_name", ""):
        option = option.partition("=")[0]
        if hasattr(error, "possibilities"):  # an unknown option
            known = error.ctx.command.get_params(error.ctx)
            name = option.strip("-").replace("_", "-").lower()
            near = did_you_mean(name, [_name(one)[2:] for one in known if one.param_type_name == "option"])
            place = f"write {name.upper()} without a name" if name.upper() in map(_name, known) else ""
            text, fix = f"no option {option}", place or near.replace("mean ", "mean --") or fix
        elif "requires" in text:
            text = f"{option}: its value is missing"
    if unexpected := re.fullmatch(r"Got unexpected extra argument\(?s?\)? \((.*)\)", text):
        text = f"unexpected argument {unexpected[1]}"
    if text[1:2].islower():
        text = text[0].lower() + text[1:]
    return text if text.endswith("?") else f"{text}; {fix}"


def _as_written(option: str, words: list[str]) -> str:
    """The word of a command line that has an option; the parser calls -top-k just -t."""
    same = [word for word in words if word.partition("=")[0] == option]
    return next((word for word in [*same, *words] if word.startswith(option)), option)


def path_of(ctx: Any) -> str:
    """The command as a user types it, however this programme was started."""
    return " ".join(["adpa", *ctx.command_path.split()[1:]])


def _name(option: Any) -> str:
    return str(max(option.opts, key=len) if option.param_type_name == "option" else option.metavar)


def _listing(names: Any) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last} are" if first else f"{last} is"


def _show_required(command: Any, ctx: Any) -> str:
    """The usage, then a line for each option and argument that is required."""
    required = [option for option in command.params if option.required]
    width = max(len(_name(option)) for option in required)
    lines = [" ".join(["usage:", path_of(ctx), *map(_example, required), "[OPTIONS]"])]
    lines += [f"  {_name(option):<{width}}  {_shortly(option.help)}" for option in required]
    columns = Console().width
    wrapped = [_wrap(line, columns, "    " if line is lines[0] else " " * (width + 4)) for line in lines]
    return "\n".join([*wrapped, f"adpa: {_listing(map(_name, required))} missing; see {path_of(ctx)} --help\n"])


def _example(option: Any) -> str:
    return f"{_name(option)} {option.metavar}" if option.param_type_name == "option" else str(option.metavar)


def _shortly(text: str) -> str:
    """The beginning of a text of help that says enough for a line."""
    sentence = re.split(r"[;.](?:\s|$)", text.replace("\\[", "["))[0]
    return sentence if len(sentence) < SHORT else re.split("[,:] ", sentence)[0]


def _narrow_help(command: Any, ctx: Any, columns: int) -> str:
    """The help without boxes; no word is cut."""
    lines = [_wrap(f"Usage: {' '.join([path_of(ctx), *command.collect_usage_pieces(ctx)])}", columns, "  ")]
    lines += ["", _wrap(command.help, columns)]
    group = None
    for option in command.get_params(ctx):
        own = "Arguments" if option.param_type_name == "argument" else str(option.rich_help_panel)
        if own != group:
            group = own
            lines += ["", group]
        is_option = option.param_type_name == "option"
        names = ", ".join(sorted([*option.opts, *option.secondary_opts], key=len)) if is_option else ""
        default = f"[default: {option.default}]" if option.default is not None and option.default is not False else ""
        beside = "[required]" if option.required else default
        lines.append(_wrap(f"  {f'{names} {option.metavar}'.strip()}", columns, "    "))
        lines.append(_wrap(f"    {option.help} {beside}".rstrip(), columns, "    "))
    lines += [f"\n{_wrap(text, columns)}" for text in (command.epilog or "").split("\n\n") if text]
    return "\n".join(lines).replace("\\[", "[")


def _wrap(text: str, columns: int, indent: str = "") -> str:
    wrapper = TextWrapper(columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text)
