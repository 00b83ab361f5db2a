"""Measures the whole product on one GPU, in a few minutes: `make bench-gpu`.

    python -m benchmarks.gpu.run --output docs/benchmarks    on a GPU
    python -m benchmarks.gpu.run --dry-run                   every part on a CPU, with tiny shapes

Each part runs in a process of its own with a time limit, so that a part that fails or hangs does not stop the others.
Time that a part does not use goes to the others. Figures are printed and written at once, beside their predictions.
The product's own output goes to standard error.
"""

import argparse
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.gpu.measures import error_line, machine, provide_version, take
from benchmarks.gpu.part import Failure, Figure, Report, Setting
from benchmarks.gpu.results import PartResult, Results, State, measured

from adpa.errors import OptionError

MINUTES = 8.0
GRACE = 2.0  # seconds for a part to report skipped measures after its time is up
# Parts are forked from this process. It imports the modules of all parts once and never initialises the GPU.
PROCESSES = multiprocessing.get_context("fork")
ENDINGS = (signal.SIGINT, signal.SIGTERM)
ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch.cuda.is_available() does not initialise the GPU
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        title: the subject of the part.
        module: its module.
        function: the function that returns its measures.
        weight: its share of the time, relative to the other parts' weights.
    """

    title: str
    module: str
    function: str
    weight: int


PARTS = {
    "a": Part("kernels' tests", "benchmarks.gpu.kernels", "kernel_tests", 75),
    "b": Part("loss head", "benchmarks.gpu.kernels", "loss_head", 85),
    "c": Part("ceilings", "benchmarks.gpu.kernels", "ceilings", 15),
    "d": Part("scoring", "benchmarks.gpu.scoring", "scoring", 95),
    "e": Part("training", "benchmarks.gpu.training", "training", 105),
    "f": Part("sampling", "benchmarks.gpu.sampling", "sampling", 40),
    "g": Part("the four commands", "benchmarks.gpu.commands", "four_commands", 65),
}


def main() -> None:
    """Reads the options and runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.gpu.run")
    parser.add_argument("--dry-run", action="store_true", help="run every part on a CPU, with tiny shapes")
    parser.add_argument("--output", type=Path, help="directory for gpu-DEVICE.json and gpu-DEVICE.md")
    parser.add_argument("--data", type=Path, help="preference pairs as JSONL; default: the repository's own texts")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time limit of all parts; default: {MINUTES:g}")
    parser.add_argument("--parts", default="".join(PARTS), help=f"letters of the parts; default: {''.join(PARTS)}")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        failed = benchmark(arguments.parts, arguments.dry_run, arguments.data, arguments.minutes, arguments.output)
    except OptionError as error:
        print(f"benchmarks.gpu.run: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(int(failed))


def benchmark(letters: str, dry_run: bool, data: Path | None, minutes: float, output: Path | None) -> bool:
    """Runs the parts of these letters, one after the other. Returns whether a part failed or was cut off.

    Raises:
        OptionError: no GPU, an unknown part, or a missing file.
    """
    end = time.monotonic() + 60 * minutes - GRACE
    if unknown := sorted(set(letters) - PARTS.keys()):
        raise OptionError(f"--parts {letters}: there is no part {unknown[0]!r}; expected letters of {''.join(PARTS)}")
    if data is not None and not data.is_file():
        raise OptionError(f"--data {data}: there is no such file")
    chosen = {letter: part for letter, part in PARTS.items() if letter in letters}
    os.environ |= ENVIRONMENT
    if dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for part in chosen.values():
        with suppress(Exception):  # the part itself reports it
            import_module(part.module)
    gc.freeze()  # garbage collections skip the imported modules
    with PROCESSES.Pool(1) as pool:
        description = pool.apply(machine)
    if description["device"] is None and not dry_run:
        raise OptionError("torch sees no GPU", "use a machine that has one, or --dry-run")

    results = Results(description, minutes, {letter: PartResult(part.title) for letter, part in PARTS.items()})
    with tempfile.TemporaryDirectory(prefix="adpa-gpu-") as folder:
        provide_version(Path(folder))
        weights = [part.weight for part in chosen.values()]
        for number, (letter, part) in enumerate(chosen.items()):
            share = part.weight / sum(weights[number:])
            deadline = time.monotonic() + share * (end - time.monotonic())
            setting = Setting("cpu" if dry_run else "cuda", Path(folder), data, deadline)
            result = results.parts[letter]
            print(f"{letter}: {part.title}, at most {setting.left:.0f} s", flush=True)
            conduct(part, setting, result, lambda: results.write(output) if output is not None else None)
            print(f"{letter}: {result.state} after {result.seconds:.1f} s", flush=True)
    print(f"costs by these rates: {results.costs_command()}")
    return any(results.parts[letter].state != "done" for letter in chosen)


def conduct(part: Part, setting: Setting, result: PartResult, write: Callable[[], None]) -> None:
    """Runs a part in a process of its own until it ends or its time is up, and keeps its reports."""
    started = time.monotonic()
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_work, args=(sender, part, setting))
    result.state = "running"

    def keep(report: Report) -> None:
        result.add(report)
        result.seconds = time.monotonic() - started
        print(f"   {_line(report)}", flush=True)
        write()

    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # an exception from a handler during a fork is lost
    process.start()
    assert process.pid is not None
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
        sender.close()
        state = _listen(receiver, setting, keep)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all processes that it started
        process.kill()
        process.join()
    result.state = "failed" if result.failures else state
    result.seconds = time.monotonic() - started
    write()


def _listen(receiver: Connection, setting: Setting, keep: Callable[[Report], None]) -> State:
    """Keeps the reports of a part's process until the process is done or its time is up. Returns the final state."""
    while receiver.poll(max(setting.left, 0) + GRACE):
        try:
            report = receiver.recv()
        except EOFError:
            keep(Failure("its process", "ended before all measures were taken"))
            return "failed"
        if report is None:
            return "done"
        keep(report)
    return "cut off"


def _line(report: Report) -> str:
    if isinstance(report, Figure):
        return f"{report.name}: {measured(report)}{report.note and f'; {report.note}'}"
    if isinstance(report, Failure):
        return f"{report.name}: failed, {report.error}"
    return f"{report.name}: skipped, {report.reason}"


def _work(sender: Connection, part: Part, setting: Setting) -> None:
    """The process of a part: takes its measures, one after the other."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)
    try:
        measures = getattr(import_module(part.module), part.function)(setting)
    except Exception as error:  # perhaps a package is not installed; it is reported
        sender.send(Failure(part.title, error_line(error)))
    else:
        take(measures, setting, sender.send)
    sender.send(None)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
