"""Compiles the row kernel for GPUs that this machine need not have, and prints its needs as JSON lines.

    python tests/kernels/compile_rows.py ARCHITECTURE [all]

Triton must not interpret its kernels in this process.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adpa.kernels.loss_rows import MAX_TOP_K, _loss_rows_kernel, launch_options

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
ALIGNED = [["tt.divisibility", 16]]


class Head(NamedTuple):
    bias: bool
    softcap: float
    scale: float


class Configuration(NamedTuple):
    dtype: torch.dtype
    head: Head
    with_gradient: bool
    top_k: int


PLAIN, FULL = Head(False, 0.0, 1.0), Head(True, 30.0, 0.5)
HEADS = [PLAIN, FULL, Head(True, 0.0, 1.0), Head(False, 30.0, 1.0), Head(False, 0.0, 0.5)]
EVERY = [Configuration(*values) for values in itertools.product(NAMES, HEADS, [True, False], [50, MAX_TOP_K])]
USUAL = [
    Configuration(torch.bfloat16, PLAIN, True, 50),
    Configuration(torch.bfloat16, PLAIN, False, 50),
    Configuration(torch.bfloat16, FULL, True, 50),
    Configuration(torch.float32, PLAIN, True, 50),
    Configuration(torch.float32, FULL, True, 50),
]


def compile_for(architecture: int, configuration: Configuration) -> Any:
    """The kernel as `loss_rows_` launches it for a vocabulary that is no multiple of 16."""
    dtype, head, with_gradient, top_k = configuration
    options = launch_options(dtype, top_k, head.softcap)
    blocks = {name: options.pop(name) for name in ("BLOCK_K", "LANES", "VECTOR")}
    constants = {"SCALE": head.scale, "SOFTCAP": head.softcap, "WITH_GRADIENT": with_gradient, **blocks}
    row = f"*{NAMES[dtype]}"
    column = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {
        "products_ptr": row,
        "bias_ptr": row,
        "labels_ptr": "*i64",
        "ids_ptr": "*i64",
        "counts_ptr": "*i1",
        **{f"{name}_ptr": column for name in ("logprobs", "advantages", "weights", "losses")},
        **dict.fromkeys(("V", "stride", "K"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    if not head.bias:
        types["bias_ptr"], constants["bias_ptr"] = "constexpr", None
    names = _loss_rows_kernel.arg_names
    source = ASTSource(
        _loss_rows_kernel,
        {name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(number,): ALIGNED for number, name in enumerate(names) if name == "stride" or types[name][0] == "*"},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def order(kernel: Any) -> str:
    """Loads (l), stores (s) and barriers (|) in the order of the program; repetitions count once."""
    letters = {"ld.global": "l", "st.global": "s", "bar.sync": "|"}
    accesses = (letters[name] for name in re.findall("|".join(map(re.escape, letters)), kernel.asm["ptx"]))
    return "".join(letter for letter, _ in itertools.groupby(accesses))


def resources(kernel: Any) -> dict[str, int]:
    """Registers and bytes of stack and local memory a thread, bytes of shared memory a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name.lower(): int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")}
    return {**counts, "shared": kernel.metadata.shared}


if __name__ == "__main__":
    for each in EVERY if "all" in sys.argv else USUAL:
        compiled = compile_for(int(sys.argv[1]), each)
        print(json.dumps({"configuration": str(each), "order": order(compiled), **resources(compiled)}), flush=True)
