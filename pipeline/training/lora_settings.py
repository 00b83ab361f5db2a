"""The options of low-rank adapters, checked. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from adpa.errors import OptionError

ALL_LINEAR = "all-linear"
ALPHA_PER_RANK = 2  # as in TRL's defaults


@dataclass(frozen=True)
class LoraSettings:
    """The adapters that are trained.

    Attributes:
        rank: rank of each adapter.
        alpha: alpha / rank scales an adapter's product.
        targets: names, or last parts of names, of the linear layers that get adapters; empty for all but the head.
        load_in_4bit: whether the layers' own weights are in 4 bits.
        dropout: share of the numbers that go into an adapter and are dropped in training.
    """

    rank: int
    alpha: float
    targets: Sequence[str]
    load_in_4bit: bool
    dropout: float = 0.0

    @property
    def packages(self) -> tuple[str, ...]:
        """The optional packages that these settings need."""
        return ("peft", "bitsandbytes") if self.load_in_4bit else ("peft",)

    @property
    def record(self) -> dict[str, Any]:
        """The settings as adpa.json has them; a resumed run must have the same."""
        targets = list(self.targets) or ALL_LINEAR
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "targets": targets,
            "load_in_4bit": self.load_in_4bit,
        }


def lora_settings(
    rank: int | None, target: str | None, load_in_4bit: bool, alpha: float | None = None, dropout: float = 0.0
) -> LoraSettings | None:
    """The adapters that the options ask for; None to train all weights.

    Raises:
        OptionError: the options contradict each other, or a package is not installed.
    """
    if rank is None:
        options = {
            "--lora-alpha": alpha is not None,
            "--lora-dropout": dropout != 0,
            "--lora-target": target is not None,
            "--load-in-4bit": load_in_4bit,
        }
        for option, is_set in options.items():
            if is_set:
                raise OptionError(f"{option} without --lora-rank", "add a rank, such as --lora-rank 16")
        return None
    targets = sorted({name.strip() for name in (ALL_LINEAR if target is None else target).split(",")})
    if "" in targets or (ALL_LINEAR in targets and len(targets) > 1):
        raise OptionError(
            f"--lora-target {target or repr(target)}; expected {ALL_LINEAR}, or names of layers with commas between"
        )
    if alpha is None:
        alpha = ALPHA_PER_RANK * rank
    settings = LoraSettings(
        rank=rank,
        alpha=int(alpha) if alpha == int(alpha) else alpha,  # other programs expect a whole number where it is one
        targets=[] if targets == [ALL_LINEAR] else targets,
        load_in_4bit=load_in_4bit,
        dropout=float(dropout),
    )
    for package in settings.packages:
        if find_spec(package) is None:
            option, extra = ("--lora-rank", "lora") if package == "peft" else ("--load-in-4bit", "qlora")
            raise OptionError(f"{option} needs {package}, which is not installed", f"pip install 'adpa[{extra}]'")
    return settings
