"""The command line: parses, calls one function of ``adpa.pipeline`` for each command, and prints."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from io import TextIOWrapper
from operator import attrgetter
from typing import Annotated, Any

import typer

from adpa.commands import Ended, as_command
from adpa.parser import HELP, MARKUP, NO_VALUE, Commands, print_error
from adpa.pipeline.terminal.report import show_report
from adpa.progress import WarningLines

REST = "the cache is whole; the same command does the rest"  # after a command on a cache was stopped
ENDINGS = (signal.SIGTERM, signal.SIGHUP)  # what schedulers send, and terminals that are closed

app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode=MARKUP,
    context_settings=HELP,
)
cache_app = typer.Typer(cls=Commands, help="Look after a cache.", rich_markup_mode=MARKUP)


def main() -> None:
    """The entry point of the ``adpa`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without α shows ? instead
    if os.environ.get("COLUMNS") == "0":  # of a terminal without a size: there would be room for nothing
        del os.environ["COLUMNS"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for ending in ENDINGS:
        if signal.getsignal(ending) != signal.SIG_IGN:  # nohup
            signal.signal(ending, _stop)
    logging.getLogger("adpa").addHandler(WarningLines())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    exit_code = _run()
    if not exit_code and (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if exit_code in [128 + number for number in (signal.SIGINT, *ENDINGS)]:  # as shells have them
        # Everything of ours is closed by now; threads of libraries that a signal caught at work abort an orderly end.
        os._exit(exit_code)
    sys.exit(exit_code)


def _run() -> Any:
    """Runs the command; the exit code."""
    try:
        exit_code = app(prog_name="adpa", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return exit_code
    except SystemExit as stop:
        exit_code = stop.code
    except OSError as error:  # of standard output: a command tells of its own errors
        if not isinstance(error, BrokenPipeError):
            print_error(f"standard output: {error.strerror}")
        exit_code = 1
    if exit_code == 1 and sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what it still holds has nowhere to go
    return exit_code


def _stop(number: int, _: object) -> None:
    """Ends the programme in order, so that engines are stopped when a scheduler stops us."""
    raise Ended(number)


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

    return as_command(precompute, show_precompute, fixed={"on_example": print_example}, after_stop=_go_on)


def _go_on(options: Mapping[str, Any]) -> str:
    return "nothing was written" if options.get("dry_run") else "the same command goes on from what is stored"


@app.command("distill")
def _distill() -> Callable[..., None]:
    """Train a student from the signals in a cache."""
    from adpa.pipeline.distill import distill

    return as_command(distill, _show_distill, after_stop=_go_on_training)


def _show_distill(done: Any) -> Any:
    from adpa.pipeline.distill import DistillReport
    from adpa.pipeline.terminal.distill import show_distill
    from adpa.pipeline.terminal.dry_run import show_plan

    return show_distill(done) if isinstance(done, DistillReport) else show_plan(done)


def _go_on_training(options: Mapping[str, Any]) -> str:
    if options["dry_run"]:
        return "nothing was written"
    if not any(options["output"].glob("*")):
        return "nothing was written; the same command starts anew"
    if not (options["save_steps"] or options["load_best_model_at_end"]):
        return f"start anew in another --output than {options['output']}; --save-steps N keeps checkpoints"
    if options["resume_from_checkpoint"] == "last":
        return "the same command goes on from the newest checkpoint"
    return "to go on from the newest checkpoint, add --resume-from-checkpoint last"


@app.command("evaluate")
def _evaluate() -> Callable[..., None]:
    """Compare a student with a baseline on held-out prompts, without a judge."""
    from adpa.pipeline.evaluate import evaluate
    from adpa.pipeline.terminal.evaluation import show_evaluation

    return as_command(evaluate, show_evaluation, after_stop=_go_on_evaluating)


def _go_on_evaluating(options: Mapping[str, Any]) -> str:
    if options["cache"] is None:
        return "the same command starts anew; --cache keeps samples and scores"
    return "the same command goes on from what is stored"


@app.command("inspect")
def _inspect() -> Callable[..., None]:
    """Show what a cache says: its signals in a few numbers, and responses token by token."""
    from adpa.pipeline.inspect import inspect_cache
    from adpa.pipeline.terminal.inspection import show_inspection

    return as_command(inspect_cache, show_inspection, arguments=["cache"], after_stop=_unchanged)


def _unchanged(_: Mapping[str, Any]) -> str:
    return "the cache is as it was"


@app.command("runs")
def _runs() -> Callable[..., None]:
    """List the students below a directory: settings, losses and evaluations."""
    from adpa.pipeline.runs import list_runs
    from adpa.pipeline.terminal.runs import show_runs

    return as_command(list_runs, show_runs, arguments=["directory"])


@app.command("lab")
def _lab() -> Callable[..., None]:
    """Measure the methods where a formula computes the preferences: no judge, no network."""
    from adpa.lab.conduct import lab

    return as_command(lab, _show_study, after_stop=_go_on)


def _show_study(report: Any) -> Any:
    from adpa.lab.report import show_study  # imports torch

    return show_study(report)


app.add_typer(cache_app, name="cache")


@cache_app.command("ls")
def _cache_ls() -> Callable[..., None]:
    """List what a cache holds, and who made it."""
    from adpa.pipeline.cache.ls import list_cache
    from adpa.pipeline.terminal.cache import show_listing

    return as_command(list_cache, show_listing, arguments=["cache"], after_stop=_unchanged)


@cache_app.command("verify")
def _cache_verify() -> Callable[..., None]:
    """Check every digest, every row and every file's name."""
    from adpa.pipeline.cache.verify import verify_cache
    from adpa.pipeline.terminal.cache import show_verification

    return as_command(
        verify_cache,
        show_verification,
        arguments=["cache"],
        failure=attrgetter("failure"),
        after_stop=lambda options: "the same command checks again" if options["repair"] else _unchanged(options),
    )


@cache_app.command("gc")
def _cache_gc() -> Callable[..., None]:
    """List what no response set needs; --yes removes it."""
    from adpa.pipeline.cache.gc import collect_garbage
    from adpa.pipeline.terminal.cache import show_garbage

    return as_command(
        collect_garbage,
        show_garbage,
        arguments=["cache"],
        after_stop=lambda options: REST if options["yes"] else _unchanged(options),
    )


@cache_app.command("pack")
def _cache_pack() -> Callable[..., None]:
    """Write many small files as few large ones; no row changes."""
    from adpa.pipeline.cache.pack import pack_cache
    from adpa.pipeline.terminal.cache import show_packing

    return as_command(pack_cache, show_packing, arguments=["cache"], after_stop=lambda _: REST)


@cache_app.command("export")
def _cache_export() -> Callable[..., None]:
    """Write a response set and its signals as plain columns."""
    from adpa.pipeline.cache.export import export_cache

    return as_command(
        export_cache,
        partial(show_report, "cache export"),
        arguments=["cache"],
        after_stop=lambda _: "nothing was written",
    )


@cache_app.command("merge")
def _cache_merge() -> Callable[..., None]:
    """Take another cache's sets, signals, samples and tokenizers."""
    from adpa.pipeline.cache.merge import merge_cache

    return as_command(
        merge_cache,
        partial(show_report, "cache merge"),
        arguments=["cache", "other"],
        failure=attrgetter("failure"),
        after_stop=lambda _: REST,
    )
