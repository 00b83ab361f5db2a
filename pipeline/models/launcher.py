"""The rank of this process, from the environment that ``torchrun`` and ``accelerate launch`` set."""

import os


def number_of_ranks() -> int:
    """The number of ranks that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_rank() -> int:
    """The rank of this process; rank 0 reports for all."""
    return int(os.environ.get("RANK", "0"))
