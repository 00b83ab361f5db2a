"""Which rank this process is: ``torchrun`` and ``accelerate launch`` say so in the environment."""

import os


def number_of_ranks() -> int:
    """How many ranks the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def this_rank() -> int:
    """Which of them this process is; 0 speaks for all."""
    return int(os.environ.get("RANK", "0"))
