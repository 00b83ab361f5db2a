"""Runs the measures of a part of the GPU benchmark, and times them."""

import gc
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.part import Failure, Figure, Measure, Report, Setting, Skipped

PACKAGES = ("adpa", "torch", "triton", "transformers", "accelerate", "datasets", "vllm", "liger-kernel", "numpy")


def take(measures: Iterable[Measure], setting: Setting, send: Callable[[Report], None]) -> None:
    """Takes one measure after the other. Reports each that fails or would take too long, and goes on with the rest."""
    for measure in measures:
        if measure.obstacle is not None:
            send(Skipped(measure.name, measure.obstacle))
            continue
        if measure.seconds > setting.left:
            send(Skipped(measure.name, f"it may take {measure.seconds:.0f} s, {max(setting.left, 0):.0f} s are left"))
            continue
        started = time.monotonic()
        try:
            for figure in measure.run():
                send(figure)
        except Exception as error:  # the product, a library or the GPU may raise anything; it is reported
            traceback.print_exc()
            send(Failure(measure.name, error_line(error)))
        print(f"{measure.name}: {time.monotonic() - started:.1f} s", flush=True)
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def error_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds that a function takes, until the GPU has finished its work."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every function in every round, after a round that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            one = seconds(run, device)
            if number:
                taken[name].append(one)
    return taken


def figure_of(name: str, values: Sequence[float], unit: str = "", note: str = "") -> Figure:
    """A figure of several values: the median, the smallest and the largest."""
    if len(values) == 1:
        return Figure(name, values[0], unit, note=note)
    return Figure(name, statistics.median(values), unit, min(values), max(values), note)


def machine() -> dict[str, Any]:
    """Device, driver and versions. The device is None if torch sees no GPU."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else None,
        "memory": torch.cuda.get_device_properties(0).total_memory if has_gpu else None,
        "driver": driver() if has_gpu else None,
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version()}
        | {name: installed for name in PACKAGES if (installed := installed_version(name))},
    }


def provide_version(folder: Path) -> None:
    """Makes adpa's version known if adpa runs from its sources and is not installed: its runs record the version."""
    if installed_version("adpa") is None:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        match = re.search('^version = "(.+)"$', project.read_text(), re.MULTILINE)
        assert match is not None
        information = folder / f"adpa-{match[1]}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: adpa\nVersion: {match[1]}\n")
        sys.path.append(str(folder))


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of the GPU's driver; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0] or None
