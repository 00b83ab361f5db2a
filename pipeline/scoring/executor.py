"""Where the models of stage one are asked: in this process, or by workers of a Ray cluster."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from adpa.data.cache.locations import Location
from adpa.errors import OptionError
from adpa.pipeline.models.launcher import number_of_ranks
from adpa.pipeline.scoring.jobs import Executor, run_here

ExecutorName = Literal["here", "ray"]


@dataclass(frozen=True)
class ExecutorOptions:
    """What a user says about it; the defaults of ``precompute``."""

    executor: ExecutorName = "here"
    workers: int | None = None
    ray_address: str | None = None

    def check(self, device: str) -> None:
        """Checks what can be checked without starting anything, with the device that the user names.

        Raises:
            OptionError: an option has no meaning, or Ray is not installed.
        """
        if number_of_ranks() > 1:
            raise OptionError(
                f"{number_of_ranks()} ranks would all do the same work", "use --executor ray --workers, or --part"
            )
        if self.executor == "here":
            for flag, value in (("--workers", self.workers), ("--ray-address", self.ray_address)):
                if value is not None:
                    raise OptionError(f"{flag} {value} without --executor ray", "add it, or leave this out")
            return
        if self.workers is None:
            raise OptionError("--executor ray without --workers", "say how many there shall be")
        if self.workers < 1:
            raise OptionError(f"--workers {self.workers}; expected at least 1")
        if device.partition(":")[2] not in ("", "0"):
            raise OptionError(f"--device {device}: Ray gives every worker its own GPU", "use --device cuda")
        ray_module = _import_ray()
        if self.ray_address is not None:
            ray_module.check_address(self.ray_address)

    def check_batches(self, most: int) -> None:
        """Checks that there is work for every worker where a job has so many batches at most.

        Raises:
            OptionError: there is not.
        """
        if self.workers is not None and self.workers > most:
            raise OptionError(
                f"--workers {self.workers}: the work is {most} batches at most", "lower --workers, or --batch-tokens"
            )

    def open(self, gpus: int, cache: Location) -> AbstractContextManager[Executor]:
        """The executor, for models that take so many GPUs; leaving its context stops what it has started."""
        if self.executor == "here":
            return nullcontext(run_here)
        opened: AbstractContextManager[Executor] = _import_ray().RayExecutor(
            self.workers, self.ray_address, gpus, cache
        )
        return opened


def _import_ray() -> ModuleType:
    try:
        return importlib.import_module("adpa.pipeline.scoring.ray_executor")
    except ImportError as error:
        raise OptionError(f"--executor ray: Ray Data cannot be imported: {error}", "pip install 'adpa[ray]'") from error
