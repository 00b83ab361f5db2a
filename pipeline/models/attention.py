"""What computes a model's attention in transformers: the values of --attn-implementation, checked. Imports no torch."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from adpa.data.sequences import Packing
from adpa.errors import ModelError, OptionError, did_you_mean, first_line

EAGER, SDPA = "eager", "sdpa"
# The packages of flash attention. If one is not installed, but KERNELS is, transformers gets the kernel from the Hub.
PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
KERNELS = "kernels"
ATTENTIONS = (EAGER, SDPA, "flex_attention", *PACKAGES)
KERNEL = re.compile("[^/:]+/[^/:]+(?:@[^/:]+)?(?::[^/:]+)?")  # of the Hub, as transformers has it


def check_attention(name: str | None) -> None:
    """Checks the value of ``--attn-implementation``; None is left to transformers.

    Raises:
        OptionError: transformers has no such attention, or its package is not installed.
    """
    if name is None:
        return
    option, kernel = f"--attn-implementation {name or repr(name)}", KERNEL.fullmatch(name)
    if name not in ATTENTIONS and not kernel:
        raise OptionError(
            f"{option}; expected one of {', '.join(ATTENTIONS)}, or a kernel of the Hub such as "
            "kernels-community/flash-attn2",
            did_you_mean(name.lower().replace("-", "_"), ATTENTIONS),
        )
    package = KERNELS if kernel else PACKAGES.get(name)
    if package is not None and not any(map(_is_installed, (package, KERNELS))):
        other = "" if kernel else f", or {KERNELS}, with which transformers gets it from the Hub"
        raise OptionError(f"{option} needs {package}, which is not installed", f"pip install {package}{other}")


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def runs_on_cpu(name: str | None) -> bool:
    """Whether a CPU can compute this attention, in every dtype."""
    return name in (None, EAGER, SDPA)


def check_packing(name: str | None, packing: Packing) -> None:
    """Checks that packed sequences can be computed with an attention.

    Raises:
        OptionError: they cannot.
    """
    if packing != "none" and not runs_on_cpu(name):
        raise OptionError(
            f"--packing {packing} with --attn-implementation {name}: it takes sdpa or eager",
            "leave one of them out",
        )


def check_place(name: str | None, device: str, dtype: str) -> None:
    """Checks that a kind of device and a dtype can compute an attention.

    Raises:
        OptionError: they cannot.
    """
    if runs_on_cpu(name):
        return
    if device == "cpu":
        raise OptionError(f"--attn-implementation {name} needs a GPU, and the device is cpu", "use sdpa or eager")
    if name in PACKAGES and dtype == "float32":
        raise OptionError(
            f"--attn-implementation {name} computes in 16 bits, and the dtype is float32",
            "use --dtype bfloat16, in training --bf16, or sdpa",
        )


def switch_attention(model: Any, name: str) -> None:
    """Gives a loaded model another attention.

    Raises:
        ModelError: transformers cannot compute the model with it.
    """
    try:
        model.set_attn_implementation(name)
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        line = first_line(error).rstrip(".")
        raise ModelError(
            f"{type(model).__name__}: no --attn-implementation {name}: {line}", "use sdpa or eager"
        ) from error
