"""An optimizer step's examples, divided over ranks and micro-batches. Imports no torch."""

from adpa.errors import OptionError
from adpa.pipeline.models.launcher import number_of_ranks


def batch_arguments(batch_size: int, micro_batch_size: int | None) -> dict[str, int]:
    """Trainer's arguments for the examples of an optimizer step, over all ranks, and of a micro-batch.

    Raises:
        OptionError: ranks and micro-batches do not divide the step evenly.
    """
    ranks = number_of_ranks()
    per_rank, rest = divmod(batch_size, ranks)
    if rest:
        raise OptionError(f"--batch-size {batch_size} on {ranks} ranks; expected a multiple of {ranks}")
    fitting = max(size for size in (1, 2, 3, 4) if per_rank % size == 0)
    micro = fitting if micro_batch_size is None else micro_batch_size
    if micro < 1 or per_rank % micro:
        raise OptionError(
            f"--micro-batch-size {micro} does not divide the {per_rank} examples of a step and rank",
            "choose a divisor",
        )
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": per_rank // micro}
