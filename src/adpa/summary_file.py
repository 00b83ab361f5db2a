"""Where ``--report`` writes the summary: to a file, or to a stream of this process."""

import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from adpa.data.cache.locations import check_writable_file, is_special
from adpa.errors import OptionError

OUTPUT = {Path(name) for name in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")}
LARGE = 2**24  # bytes, of which no summary has so many
ERRORS = {Path(name) for name in ("/dev/stderr", "/dev/fd/2", "/proc/self/fd/2")}


@contextmanager
def summary_file(report: Path | None) -> Iterator[Callable[[Any], None]]:
    """Yields the function that writes a report.

    If it goes to standard output, it is alone there: what else is printed meanwhile goes to standard error.

    Raises:
        OptionError: the file cannot be written.
    """
    if report is None:
        yield lambda _: None
    elif report in OUTPUT:
        output = sys.stdout
        if output is None:
            raise OptionError(f"--report {report}: standard output is closed", "name a file")
        with redirect_stdout(sys.stderr):
            yield lambda done: print(_as_json(done), end="", file=output, flush=True)
    elif report in ERRORS:
        yield lambda done: print(_as_json(done), end="", file=sys.stderr, flush=True)
    else:
        check_writable_file("--report", report)
        yield lambda done: _write(report, _as_json(done))


def is_summary(file: Path, keys: Collection[str]) -> bool:
    """Whether a file has a summary with these keys, or with some of them: an earlier adpa had fewer."""
    try:
        small = file.is_file() and file.stat().st_size < LARGE
        content = json.loads(file.read_bytes()) if small else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and len(content) > 1 and content.keys() <= set(keys)


def _write(report: Path, text: str) -> None:
    from adpa.data.cache.files import write_file  # imports pyarrow, for which nobody's mistake should wait

    try:
        if is_special(report):
            report.write_text(text)
        else:
            write_file(report.resolve(), text.encode())
    except OSError as error:
        raise RuntimeError(f"--report {report}: {error.strerror}") from error


def _as_json(done: Any) -> str:
    return json.dumps(dataclasses.asdict(done), indent=2) + "\n"
