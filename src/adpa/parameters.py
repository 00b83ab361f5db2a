"""From a parameter of a stage to an option of its command: its type, and the ``Doc`` and ``Group`` beside it."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.markup import escape
from typing_extensions import Doc

from adpa.data.cache.locations import Location
from adpa.parser import NO_VALUE
from adpa.pipeline.options import Group, is_list, kind_of
from adpa.values import read_value


def as_option(parameter: inspect.Parameter, read: Callable[..., Any] | None = None) -> inspect.Parameter:
    """The parameter as an option of a command; one with its own ``read`` is read before the others."""
    flag = f"--{parameter.name.replace('_', '-')}"
    is_switch = kind_of(parameter) is bool and parameter.default is False  # needs no --no-… beside it
    option = typer.Option(
        *([flag] if is_switch else []),
        help=_help(parameter),
        metavar=_metavar(parameter),
        parser=_as_written,
        callback=read or _reader(parameter),
        is_eager=read is not None,
        autocompletion=_completion(parameter),
        rich_help_panel=group_of(parameter),
    )
    return _with(parameter, option)


def as_argument(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter as an argument of a command: it has a place instead of a name, and the help lists it apart."""
    argument = typer.Argument(
        help=_help(parameter), metavar=parameter.name.upper(), parser=_as_written, callback=_reader(parameter)
    )
    return _with(parameter, argument)


def group_of(parameter: inspect.Parameter) -> Group:
    """The group of help that a parameter declares; default: the last one."""
    return next((part for part in get_args(parameter.annotation) if isinstance(part, Group)), Group.OTHER)


def doc_of(parameter: inspect.Parameter) -> str:
    """Its text of help; empty for a parameter that is no option."""
    return next((part.documentation for part in get_args(parameter.annotation) if isinstance(part, Doc)), "")


def _with(parameter: inspect.Parameter, shown: Any) -> inspect.Parameter:
    """The parser sees switches, texts and lists of texts."""
    kind = bool if kind_of(parameter) is bool else str
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=parameter.default,
        annotation=Annotated[list[str] if is_list(parameter) else kind, shown],
    )


def _as_written(value: Any) -> Any:
    return value


def _reader(parameter: inspect.Parameter) -> Callable[..., Any]:
    """Reads what the command line or a file of options has for a parameter."""
    kind = kind_of(parameter)

    def read(context: typer.Context, option: typer.CallbackParam, written: Any) -> Any:
        source = getattr(context.get_parameter_source(parameter.name), "name", "DEFAULT")
        if source == "DEFAULT":
            return written
        label = max(option.opts, key=len) if option.param_type_name == "option" else parameter.name.upper()
        if source == "DEFAULT_MAP":
            label = f"--config {context.params['config']}: {parameter.name.replace('_', '-')}"
        if is_list(parameter):
            return [read_value(label, kind, one) for one in written]
        return read_value(label, kind, written)

    return read


def _completion(parameter: inspect.Parameter) -> Callable[[str], list[str]] | None:
    """Completes the names that can be chosen; a shell completes paths by itself."""
    kind = kind_of(parameter)
    if get_origin(kind) is not Literal:
        return None

    def complete(incomplete: str) -> list[str]:
        return [name for name in get_args(kind) if name.startswith(incomplete)]

    return complete


def _help(parameter: inspect.Parameter) -> str:
    """The text of the ``Doc``, and the names that can be chosen if it does not say them; brackets are no markup."""
    text, kind = doc_of(parameter), kind_of(parameter)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if not all(name in text for name in choices):
        text += f" One of {', '.join(choices)}."
    return escape(text)


def _metavar(parameter: inspect.Parameter) -> str:
    """What stands for the value, short enough for 80 columns."""
    kind = kind_of(parameter)
    if get_origin(kind) is Literal:
        return "<name>"
    if kind == Location:
        return "PATH|URL"
    names = {bool: NO_VALUE, int: "<int>", float: "<float>", Mapping: "<json>", Path: "<path>"}
    return names.get(kind, "<str>")
