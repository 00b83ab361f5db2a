"""Students sharded over ranks: checks and settings that FSDP2 and DeepSpeed need, beyond Trainer's own.

Trainer turns them on: ``--set fsdp=true`` or ``accelerate launch`` for FSDP2, ``--set deepspeed=FILE.json`` for ZeRO.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from adpa.errors import OptionError


def check_sharding(arguments: TrainingArguments) -> None:
    """Checks that Trainer will shard the student as the arguments say.

    Raises:
        OptionError: it cannot, or would silently not shard.
    """
    if _asks_for_fsdp(arguments):
        version = int((arguments.fsdp_plugin_args or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
        if version != 2:
            raise OptionError(f"FSDP in version {version}; adpa trains with FSDP2", "set fsdp_version to 2")
        ranks = arguments.distributed_state.distributed_type
        if ranks in (DistributedType.NO, DistributedType.MULTI_CPU):
            raise OptionError(
                f"fsdp with ranks of the type {ranks.value}, where it would do nothing; expected a rank on each GPU",
                "start it with torchrun or accelerate launch on GPUs, or leave fsdp out",
            )
    zero = arguments.deepspeed_plugin.hf_ds_config if arguments.deepspeed_plugin else None
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if zero is not None and zero.is_zero3() and not zero.is_true(gather):
        raise OptionError(
            f"DeepSpeed's {gather} is not true, so the trained student cannot be written", "set it to true"
        )


def sharding_name(arguments: TrainingArguments) -> str | None:
    """How the student is sharded, for adpa.json; None if every rank has all of it."""
    if _asks_for_fsdp(arguments):
        return "FSDP2"
    return f"ZeRO-{arguments.deepspeed_plugin.zero_stage}" if arguments.deepspeed_plugin else None


def check_shards(checkpoint: Path, arguments: TrainingArguments) -> None:
    """Checks that DeepSpeed can read a checkpoint on this number of ranks.

    Raises:
        OptionError: another number of ranks wrote it.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None or plugin.hf_ds_config.is_true("checkpoint.load_universal"):
        return
    written = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if written != arguments.world_size:
        raise OptionError(
            f"{checkpoint}: DeepSpeed wrote it on {written} ranks; this run has {arguments.world_size}",
            f"resume with {written} ranks; with ZeRO-3, deepspeed.checkpoint.ds_to_universal converts it, and "
            "checkpoint.load_universal reads that",
        )


@contextmanager
def loading_whole(arguments: TrainingArguments) -> Iterator[None]:
    """Loads models whole under ZeRO-3 too; DeepSpeed shards them when training begins.

    A model that is sharded while it loads cannot be called before training, but the check of a student's head calls it.
    """
    plugin_config = getattr(arguments.deepspeed_plugin, "dschf", None)
    config = getattr(arguments, "hf_deepspeed_config", plugin_config)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def _asks_for_fsdp(arguments: TrainingArguments) -> bool:
    return bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
