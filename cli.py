"""The command line: parses, calls one function of ``adpa.pipeline`` for each command, and prints."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from io import TextIOWrapper
from operator import attrgetter
from typing import Annotated, Any

import typer
from tqdm.contrib import DummyTqdmFile

from adpa.commands import MARKUP, Commands, as_command, print_error
from adpa.parameters import NO_VALUE
from adpa.pipeline.terminal.report import show_report

ENDINGS = (signal.SIGTERM, signal.SIGHUP)  # what schedulers send, and terminals that are closed
UsageError: Any = typer.BadParameter.__mro__[1]  # what the parser raises; typer has no public name for it

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=MARKUP,
)
cache_app = typer.Typer(cls=Commands, help="Look after a cache.", rich_markup_mode=MARKUP)


def main() -> None:
    """The entry point of the ``adpa`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without α shows ? instead
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for ending in ENDINGS:
        if signal.getsignal(ending) != signal.SIG_IGN:  # nohup
            signal.signal(ending, _stop)
    warnings = logging.StreamHandler(DummyTqdmFile(sys.stderr))  # a line of its own above Trainer's progress bar
    warnings.setFormatter(logging.Formatter("adpa: warning: %(message)s"))
    logging.getLogger("adpa").addHandler(warnings)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        exit_code = app(prog_name="adpa", standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "adpa"
        print_error(f"{' '.join(error.format_message().split())} See {command} --help")
        exit_code = error.exit_code
    except SystemExit as stop:
        exit_code = stop.code
    if exit_code == 128 + signal.SIGINT:
        print_error("interrupted")
    if not exit_code and (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if exit_code in [128 + number for number in (signal.SIGINT, *ENDINGS)]:  # as shells have them
        # Everything of ours is closed by now; threads of libraries that a signal caught at work abort an orderly end.
        sys.stdout.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _stop(number: int, _: object) -> None:
    """Ends the programme in order, so that engines are stopped when a scheduler stops us."""
    sys.exit(128 + number)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"adpa {version('adpa')}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True, metavar=NO_VALUE
        ),
    ] = False,
) -> None:
    """Advantage-guided distillation: align a small language model from the signals of a large one."""


@app.command("precompute")
def _precompute() -> Callable[..., None]:
    """Score responses with the teacher, and the reference beside it, and keep the signals in a cache."""
    from adpa.pipeline.precompute import precompute
    from adpa.pipeline.terminal.precompute import print_example, show_precompute

    return as_command(precompute, show_precompute, fixed={"on_example": print_example})


@app.command("distill")
def _distill() -> Callable[..., None]:
    """Train a student from the signals in a cache."""
    from adpa.pipeline.distill import distill

    return as_command(distill)


@app.command("evaluate")
def _evaluate() -> Callable[..., None]:
    """Compare a student with a baseline on held-out prompts, without a judge."""
    from adpa.pipeline.evaluate import evaluate

    return as_command(evaluate)


@app.command("inspect")
def _inspect() -> Callable[..., None]:
    """Show what a cache says: its signals in a few numbers, and responses token by token."""
    from adpa.pipeline.inspect import inspect_cache
    from adpa.pipeline.terminal.inspection import show_inspection

    return as_command(inspect_cache, show_inspection, arguments=["cache"])


@app.command("lab")
def _lab() -> Callable[..., None]:
    """Measure the methods where a formula computes the preferences: no judge, no network."""
    from adpa.lab.conduct import lab

    return as_command(lab, _show_study)


def _show_study(report: Any) -> Any:
    from adpa.lab.report import show_study  # imports torch

    return show_study(report)


app.add_typer(cache_app, name="cache")


@cache_app.command("ls")
def _cache_ls() -> Callable[..., None]:
    """List what a cache holds, and who made it."""
    from adpa.pipeline.cache.ls import list_cache
    from adpa.pipeline.terminal.cache import show_listing

    return as_command(list_cache, show_listing, arguments=["cache"])


@cache_app.command("verify")
def _cache_verify() -> Callable[..., None]:
    """Check every digest, every row and every file's name."""
    from adpa.pipeline.cache.verify import verify_cache
    from adpa.pipeline.terminal.cache import show_verification

    return as_command(verify_cache, show_verification, arguments=["cache"], failure=attrgetter("failure"))


@cache_app.command("gc")
def _cache_gc() -> Callable[..., None]:
    """List what no response set needs; --yes removes it."""
    from adpa.pipeline.cache.gc import collect_garbage
    from adpa.pipeline.terminal.cache import show_garbage

    return as_command(collect_garbage, show_garbage, arguments=["cache"])


@cache_app.command("pack")
def _cache_pack() -> Callable[..., None]:
    """Write many small files as few large ones; no row changes."""
    from adpa.pipeline.cache.pack import pack_cache
    from adpa.pipeline.terminal.cache import show_packing

    return as_command(pack_cache, show_packing, arguments=["cache"])


@cache_app.command("export")
def _cache_export() -> Callable[..., None]:
    """Write a response set and its signals as plain columns."""
    from adpa.pipeline.cache.export import export_cache

    return as_command(export_cache, partial(show_report, "cache export"), arguments=["cache"])


@cache_app.command("merge")
def _cache_merge() -> Callable[..., None]:
    """Take another cache's sets, signals, samples and tokenizers."""
    from adpa.pipeline.cache.merge import merge_cache

    return as_command(
        merge_cache, partial(show_report, "cache merge"), arguments=["cache", "other"], failure=attrgetter("failure")
    )
