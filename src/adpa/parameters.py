"""From a parameter of a stage to an option of its command: its type, and the ``Doc`` and ``Group`` beside it."""

import inspect
import json
from collections.abc import Mapping
from functools import partial
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.markup import escape
from typing_extensions import Doc
from upath import UPath

from adpa.pipeline.options import Group

NO_VALUE = ""  # what a switch takes


def as_option(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter as an option of a command."""
    flag = f"--{parameter.name.replace('_', '-')}"
    is_switch = bool in _types(parameter) and parameter.default is False  # needs no --no-… beside it
    option = typer.Option(
        *([flag] if is_switch else []),
        help=_help(parameter),
        metavar=_metavar(parameter),
        parser=partial(_json_object, flag) if _is_mapping(parameter) else None,
        rich_help_panel=group_of(parameter),
    )
    return _with(parameter, option)


def as_argument(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter as an argument of a command: it has a place instead of a name, and the help lists it apart."""
    return _with(parameter, typer.Argument(help=_help(parameter), metavar=parameter.name.upper()))


def group_of(parameter: inspect.Parameter) -> Group:
    """The group of help that a parameter declares; default: the last one."""
    return next((part for part in get_args(parameter.annotation) if isinstance(part, Group)), Group.OTHER)


def has_doc(parameter: inspect.Parameter) -> bool:
    """Whether it has a text of help, and so is an option."""
    return any(isinstance(part, Doc) for part in get_args(parameter.annotation))


def is_location(parameter: inspect.Parameter) -> bool:
    """Whether it takes a directory or a URL."""
    return UPath in _types(parameter)


def _with(parameter: inspect.Parameter, shown: Any) -> inspect.Parameter:
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=parameter.default,
        annotation=Annotated[_option_type(parameter), shown],
    )


def _annotated(parameter: inspect.Parameter) -> Any:
    return get_args(parameter.annotation)[0]


def _types(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """The types of a union; a Literal and a list stay whole."""
    annotated = _annotated(parameter)
    return (annotated,) if get_origin(annotated) in (Literal, list) else get_args(annotated) or (annotated,)


def _option_type(parameter: inspect.Parameter) -> Any:
    """The type of the option; a location is read as text, so that a URL keeps its slashes."""
    if _is_mapping(parameter):
        return dict | None
    if not is_location(parameter):
        return _annotated(parameter)
    return str | None if NoneType in _types(parameter) else str


def _help(parameter: inspect.Parameter) -> str:
    """The text of the ``Doc``, and the names that can be chosen if it does not say them; brackets are no markup."""
    text = next(part.documentation for part in get_args(parameter.annotation) if isinstance(part, Doc))
    choices = [name for one in _types(parameter) if get_origin(one) is Literal for name in get_args(one)]
    if not all(name in text for name in choices):
        text += f" One of {', '.join(choices)}."
    return escape(text)


def _is_mapping(parameter: inspect.Parameter) -> bool:
    return any(get_origin(one) is Mapping for one in _types(parameter))


def _json_object(flag: str, given: str | dict[str, Any]) -> dict[str, Any]:
    """The object that a user wrote as JSON, or as a mapping in a file of options."""
    try:
        value = json.loads(given) if isinstance(given, str) else given
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise typer.BadParameter(f"{given!r:.60} is no JSON; write {flag} '{{\"name\": value}}'") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{given!r:.60} is no JSON object; write {flag} '{{\"name\": value}}'")
    return value


def _metavar(parameter: inspect.Parameter) -> str | None:
    """What stands for the value, short enough for 80 columns; by default the parser names the type."""
    for one in _types(parameter):
        if get_origin(one) is Literal:
            return "<name>"
        if get_origin(one) is list:
            return f"<{get_args(one)[0].__name__}>"
        if one is bool:
            return NO_VALUE
    if _is_mapping(parameter):
        return "<json>"
    return "PATH|URL" if is_location(parameter) else None
