"""Where the models of stage one run: in this process, or in workers of a Ray cluster."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from adpa.data.cache.locations import Location
from adpa.errors import OptionError
from adpa.pipeline.models.launcher import number_of_ranks
from adpa.pipeline.option_checks import check_choices, check_counts, check_not_empty
from adpa.pipeline.scoring.jobs import Executor, run_here

LAST_PORT = 65535
ExecutorName = Literal["here", "ray"]


@dataclass(frozen=True)
class ExecutorOptions:
    """The options of the executor, with the defaults of ``precompute``."""

    executor: ExecutorName = "here"
    workers: int | None = None
    ray_address: str | None = None

    def check(self, device: str) -> None:
        """Checks the options, and the value of ``--device`` beside them, without starting anything.

        Raises:
            OptionError: an option is out of range or does not fit the others, or Ray is not installed.
        """
        check_choices({"--executor": (self.executor, ExecutorName)})
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
            raise OptionError("--executor ray without --workers", "set the number of workers")
        check_counts({"--workers": self.workers})
        check_not_empty({"--ray-address": self.ray_address})
        number = device.partition(":")[2]
        if number.isdigit() and int(number) != 0:
            raise OptionError(f"--device {device}: Ray gives every worker its own GPU", "use --device cuda")
        self._check_address()
        ray_module = _import_ray()
        if self.ray_address is not None:
            ray_module.check_address(self.ray_address)

    def _check_address(self) -> None:
        """Checks the form of the address, which needs no Ray."""
        address = self.ray_address or "auto"
        host, _, port = address.rpartition(":")
        if address != "auto" and (not host or not port.isdigit() or "/" in host or int(port) > LAST_PORT):
            raise OptionError(f"--ray-address {address}; expected auto or host:port", "write it as node1:6379")

    def check_batches(self, batches: int) -> None:
        """Checks that every worker can get work. The largest job has at most this many batches.

        Raises:
            OptionError: there are more workers than batches.
        """
        if self.workers is not None and self.workers > batches:
            raise OptionError(
                f"--workers {self.workers}: the work has {batches} batches at most",
                "lower --workers, or --batch-tokens",
            )

    def open(self, gpus: int, cache: Location) -> AbstractContextManager[Executor]:
        """The executor, for models that each take this many GPUs. Leaving its context stops whatever it started."""
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
