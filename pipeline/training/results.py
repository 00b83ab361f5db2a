"""What a finished run leaves: the student, adpa.json, the curves, the model card."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from transformers.trainer_utils import align_special_tokens

from adpa.data.cache.files import write_file
from adpa.pipeline.models.launcher import number_of_ranks, this_rank
from adpa.pipeline.training.lora import merge_adapters
from adpa.pipeline.training.model_card import card_facts, write_card
from adpa.pipeline.training.model_sharding import loading_whole
from adpa.pipeline.training.run import Run, Sources, Student
from adpa.pipeline.training.run_directory import CARD, CURVES, write_record
from adpa.pipeline.training.trainer import DistillTrainer
from adpa.pipeline.training.validation import evaluations_of, step_kept

ADAPTER = "adapter"
# The fields of a report that adpa.json has too.
REPORTED = (
    "data", "examples", "trained_parameters", "compute_dtype", "weights_dtype", "steps", "seconds", "tokens_per_second",
    "validation_examples", "best_step", "stopped_early",
)  # fmt: skip


def save_student(run: Run, sources: Sources, student: Student, trainer: DistillTrainer) -> None:
    """Writes the trained student as an ordinary checkpoint; with LoRA merged, and the adapters in a folder of it."""
    if run.lora is None:
        trainer.save_student(run.output)
        return
    trainer.save_student(run.output / ADAPTER)
    if this_rank() != 0:
        return
    (run.output / ADAPTER / CARD).unlink(missing_ok=True)  # PEFT's has nothing but the path of the base
    with loading_whole(run.arguments):
        dtype = sources.checkpoint.dtype_name(run.dtype)
        merged = merge_adapters(sources.checkpoint, run.output / ADAPTER, dtype)
    align_special_tokens(merged, sources.tokenizer)
    merged.generation_config = student.model.generation_config
    merged.save_pretrained(run.output)
    sources.tokenizer.save_pretrained(run.output)


def write_result(
    run: Run,
    sources: Sources,
    student: Student,
    origin: Mapping[str, Any],
    report: Mapping[str, Any],
    trainer: DistillTrainer,
    chosen: Mapping[str, Any],
    usual: Mapping[str, Any],
) -> None:
    """Writes adpa.json of a finished run, the curves of its logs, and its model card.

    ``chosen`` and ``usual`` are as in ``warn_before``.
    """
    if this_rank() != 0:
        return
    from adpa.pipeline.training.curves import draw_curves  # matplotlib, which nothing before needs

    packages = ("adpa", "torch", "transformers", *(run.lora.packages if run.lora else ()))
    result = {name: report[name] for name in REPORTED} | {
        "packing": run.packing,
        "attn_implementation": student.attention,  # like packing, it changes rounding alone
        "ranks": number_of_ranks(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "kept_step": step_kept(trainer.args, trainer.state),
        "warnings": trainer.warnings,
        "student_before": trainer.student_before,
        "losses": trainer.losses,
        "held_out": evaluations_of(trainer.state.log_history),
    }
    before = sources.checkpoint
    changed = {name: value for name, value in chosen.items() if value != usual[name]}
    record = {**origin, **result, **card_facts(changed, sources.selection, before.identity, before.directory)}
    write_record(run.output, record)
    write_file(run.output / CURVES, draw_curves(record).encode())
    write_card(run.output)
