"""The kernels compiled for GPUs, on any machine: barriers stay, and they fit into registers and shared memory.

Triton either interprets or compiles in one process, and the tests' own interprets: another one compiles.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adpa

# Gather, barrier, −inf, barrier, first pass, barrier, signals, barrier, losses, and with a gradient: barrier, second
# pass, barrier, scatter. An interpreter has no threads that could miss a barrier.
ORDER = r"l\|s\|l\|l\|s(\|(ls|sl)\|s)?"
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}


def compiling_process(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(adpa.__file__).parents[1])
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("which", ["usual", pytest.param("all", marks=pytest.mark.slow)])
def test_the_kernel_keeps_its_barriers_and_fits_into_registers_and_shared_memory(architecture: int, which: str) -> None:
    script = Path(__file__).with_name("compile_rows.py")
    finished = compiling_process(str(script), str(architecture), which)
    assert finished.returncode == 0, finished.stderr
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(rows) == (80 if which == "all" else 5)
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert re.fullmatch(ORDER, row["order"]), row
        assert row["shared"] <= SHARED_MEMORY[architecture], row


def test_the_pass_over_a_teachers_logits_fits_into_registers_and_shared_memory() -> None:
    finished = compiling_process("-m", "tests.kernels.compile_groups", *map(str, SHARED_MEMORY))
    assert finished.returncode == 0, finished.stderr
    configurations = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(configurations) == len(SHARED_MEMORY) * 3 * 2
    for usage in configurations:
        assert usage["stack"] == usage["local"] == 0, usage
        assert usage["shared"] <= SHARED_MEMORY[usage["architecture"]], usage


def test_tensors_on_a_cpu_are_refused_where_triton_compiles() -> None:
    script = """
from tests.kernels.oracle import random_problem
from adpa.kernels.head import distill_head
distill_head(*random_problem())
try:
    distill_head(*random_problem(), backend="triton")
except ValueError as error:
    print(error)
"""
    message = "hidden is on cpu, backend 'triton' runs on CUDA; use backend='torch'"
    assert message in compiling_process("-c", script).stdout
