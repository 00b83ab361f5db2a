"""Prints the tables of ``benchmarks.costs`` in Markdown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import get_args, get_type_hints

import numpy as np
from benchmarks.cost_model import (
    BFLOAT16,
    FP8,
    STUDENTS,
    TEACHERS,
    Assumptions,
    Pairs,
    adpa_gpu_hours,
    dckd_gpu_hours,
    gpus_of_engine,
    needed_flops,
    sampling_seconds,
    scoring_head_share,
    scoring_seconds,
    slowest_rank_flops,
    step_seconds,
    training_seconds,
)

from adpa.data.sequences import Packing

GPUS = (1, 8, 64)
PACKINGS: tuple[Packing, ...] = get_args(Packing)
RUNS = (1, 2, 4, 8, 16)
# From docs/benchmarks/encoding.md, the vocabulary of 128,256, teacher and reference (its command is there).
BYTES_PER_TOKEN = {"compact": 227.0, "compact, --lossy": 139.2}
TOKENS_READ_PER_SECOND = {"compact": 672_532, "compact, --lossy": 557_062}


@dataclass(frozen=True)
class Flops:
    """FLOP of some sequences: the decoder's forward pass, the head's, and a whole training step."""

    decoder: float
    head: float
    training: float


def meanings() -> dict[str, str]:
    """The meaning of each assumption."""
    hints = get_type_hints(Assumptions, include_extras=True)
    return {name: hint.__metadata__[0].documentation for name, hint in hints.items()}


def option(name: str) -> str:
    """The option of an assumption."""
    return "--" + name.replace("_", "-")


def print_lengths(pairs: Pairs, assumed: Assumptions) -> None:
    """Prints the tokens of a pair."""
    columns = {
        "prompt": pairs.prompt,
        "chosen": pairs.chosen,
        "rejected": pairs.rejected,
        "prompt + chosen, prompt + rejected": 2 * pairs.prompt + pairs.chosen + pairs.rejected,
        "response rows, chosen and rejected": pairs.chosen + pairs.rejected,
    }
    print_table(
        f"Measured: tokens of a pair ({len(pairs.prompt)} pairs, SmolLM2's tokenizer, the default limits).",
        ("tokens", "mean", "standard error", "median", "largest", f"times {assumed.pairs:,}"),
        [
            (
                name,
                f"{tokens.mean():.1f}",
                f"{tokens.std(ddof=1) / len(tokens) ** 0.5:.1f}",
                f"{np.median(tokens):.0f}",
                f"{tokens.max()}",
                f"{tokens.mean() * assumed.pairs / 1e6:.1f} M",
            )
            for name, tokens in columns.items()
        ],
    )


def print_flops(sequences: int, counted: Flops, expected: Flops) -> None:
    """Prints the counted FLOP beside the formula's."""
    names = {"decoder": "decoder, forward", "head": "head, forward", "training": "training, forward and backward"}
    print_table(
        f"Measured: FLOP of {sequences} sequences of these pairs in one padded batch, SmolLM2-135M, as torch's "
        "FlopCounterMode counts them.",
        ("part", "counted", "formula", "counted / formula"),
        [
            (names[part], f"{flops:,.0f}", f"{asdict(expected)[part]:,.0f}", f"{flops / asdict(expected)[part]:.6f}")
            for part, flops in asdict(counted).items()
        ],
    )


def print_shapes(pairs: Pairs, assumed: Assumptions) -> None:
    """Prints the numbers that follow from the shapes."""
    whole = np.concatenate([responses.whole for responses in pairs.responses()])
    rows = []
    for shape in (*TEACHERS, *STUDENTS):
        flops = shape.decoder_flops(whole).sum() / whole.sum()
        rows.append(
            (
                shape.name,
                f"{shape.parameters / 1e9:.3f}",
                f"{shape.matrices / 1e9:.3f}",
                f"{flops / 1e9:.2f}",
                f"{1 - 2 * shape.matrices / flops:.1%}",
                f"{shape.head_flops(1) / 1e9:.2f}",
                f"{shape.weight_bytes / 1e9:.1f}",
                *(f"{gpus_of_engine(shape, assumed, size)}" for size in (BFLOAT16, FP8)),
            )
        )
    print_table(
        "Computed from the published shapes, on sequences of the measured lengths.",
        (
            "model",
            "parameters, 10⁹",
            "P, 10⁹",
            "GFLOP/token, decoder forward",
            "of it attention",
            "GFLOP/row, head forward",
            "GB in bfloat16",
            "GPUs that hold it",
            "in fp8",
        ),
        rows,
    )


def print_assumptions(assumed: Assumptions) -> None:
    """Prints the assumptions."""
    print_table(
        "Assumed: every line is an option of the command.",
        ("option", "value", "meaning"),
        [
            (f"`{option(name)}`", f"{value:g}" if isinstance(value, float) else f"{value}", meanings()[name])
            for name, value in asdict(assumed).items()
        ],
    )


def print_scoring(pairs: Pairs, assumed: Assumptions) -> None:
    """Prints the hours of scoring."""
    rows = []
    for teacher in TEACHERS:
        for what, sets, models in (
            ("teacher, chosen and rejected (DCKD)", pairs.responses(), 1),
            ("teacher and reference, chosen and rejected", pairs.responses(), 2),
            ("teacher and reference, a student's samples (ADPA)", [pairs.sampled()], 2),
        ):
            times = [hours(scoring_seconds(teacher, sets, gpus, assumed), gpus, models) for gpus in GPUS]
            rows.append((teacher.name, what, f"{scoring_head_share(teacher, sets, assumed):.0%}", *times))
    print_table(
        f"Scoring {assumed.pairs:,} pairs: hours (GPU-hours).",
        ("model", "what", "of it the head", *(plural(gpus, "GPU") for gpus in GPUS)),
        rows,
    )


def print_training(pairs: Pairs, assumed: Assumptions) -> None:
    """Prints the hours of training and the parts of a step's time."""
    sets, rows = pairs.responses(), []
    for student in STUDENTS:
        for gpus in GPUS:
            step = step_seconds(student, sets, gpus, assumed)
            cells = ["refused"] * 5
            if step is not None:
                computed = gpus * slowest_rank_flops(student, sets, gpus, assumed)
                parts = (step.compute, step.all_reduce, step.optimizer, step.seconds)
                cells = [
                    f"{computed / needed_flops(student, sets, assumed):.2f}",
                    *(f"{1000 * seconds:.0f}" for seconds in parts),
                ]
            seconds = [training_seconds(student, sets, gpus, replace(assumed, packing=packing)) for packing in PACKINGS]
            runs = [hours(time, gpus, missing="refused") for time in seconds]
            rows.append((student.name, f"{gpus}", f"{assumed.batch / gpus:g}", *cells, *runs))
    print_table(
        f"Training with DCKD, {plural(assumed.epochs, 'epoch')} of {assumed.pairs:,} pairs: milliseconds of a step "
        f"with `--packing {assumed.packing}`, hours (GPU-hours) of a run with each `--packing`.",
        (
            *("student", "GPUs", "examples/GPU", "computed / needed", "compute", "all-reduce", "AdamW", "step"),
            *(f"run, {packing}" for packing in PACKINGS),
        ),
        rows,
    )
    print_table(
        f"Sampling one response to each of {assumed.pairs:,} prompts, for ADPA.",
        ("student", "GPU-hours"),
        [(one.name, f"{sampling_seconds(one, pairs.sampled(), assumed) / 3600:.2f}") for one in STUDENTS],
    )


def print_totals(pairs: Pairs, assumed: Assumptions) -> None:
    """Prints the hours of DCKD from the first command to the last step."""
    sets, rows = pairs.responses(), []
    for teacher in TEACHERS:
        for student in STUDENTS:
            cells = []
            for gpus in GPUS:
                scoring = scoring_seconds(teacher, sets, gpus, assumed)
                training = training_seconds(student, sets, gpus, assumed)
                if scoring is None or training is None:
                    cells.append("does not fit" if scoring is None else "refused")
                else:
                    cells.append(hours(scoring + training, gpus))
            rows.append((teacher.name, student.name, *cells))
    print_table(
        f"DCKD on {assumed.pairs:,} pairs, scoring and then training on the same GPUs: hours (GPU-hours).",
        ("teacher", "student", *(plural(gpus, "GPU") for gpus in GPUS)),
        rows,
    )


def print_sharing(pairs: Pairs, assumed: Assumptions) -> None:
    """Prints the GPU-hours of n students, from one cache and with a live teacher."""
    rows = []
    for teacher in TEACHERS:
        for student in STUDENTS:
            for students in RUNS:
                cells: list[str] = []
                for cost in (dckd_gpu_hours, adpa_gpu_hours):
                    spent = cost(teacher, student, pairs, students, assumed)
                    cells += [f"{spent.shared:.1f}", f"{spent.live:.1f}", f"{spent.live / spent.shared:.1f}"]
                rows.append((teacher.name, student.name, f"{students}", *cells))
    print_table(
        f"GPU-hours of n students, {plural(assumed.epochs, 'epoch')}: from one cache, and with teacher (and reference) "
        "live in every run.",
        (
            *("teacher", "student", "n"),
            *("DCKD, cache", "DCKD, live", "live / cache"),
            *("ADPA, cache", "ADPA, live", "live / cache"),
        ),
        rows,
    )


def print_cache(pairs: Pairs, assumed: Assumptions) -> None:
    """Prints the size of the cache on disk and the time of one thread to read it in an epoch."""
    tokens = float(sum(one.response.mean() for one in pairs.responses())) * assumed.pairs
    sampled = float(pairs.sampled().response.mean()) * assumed.pairs
    print_table(
        f"The cache of {assumed.pairs:,} pairs, K = 50, teacher and reference.",
        ("encoding", "bytes/token", "chosen and rejected", "a student's samples", "thread-minutes to read the pairs"),
        [
            (
                name,
                f"{size}",
                f"{tokens * size / 1e9:.1f} GB",
                f"{sampled * size / 1e9:.1f} GB",
                f"{tokens / TOKENS_READ_PER_SECOND[name] / 60:.1f}",
            )
            for name, size in BYTES_PER_TOKEN.items()
        ],
    )


def hours(seconds: float | None, gpus: int, times: int = 1, missing: str = "does not fit") -> str:
    """A cell of the table: hours and GPU-hours of a job that runs ``times`` times."""
    if seconds is None:
        return missing
    return f"{times * seconds / 3600:.2f} ({times * gpus * seconds / 3600:.1f})"


def plural(count: int, noun: str) -> str:
    """The count with its noun: 1 GPU, 8 GPUs."""
    return f"{count} {noun}" + "s" * (count != 1)


def print_table(caption: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    print(f"{caption}\n")
    for cells in (names, ["---"] * len(names), *rows):
        print("| " + " | ".join(cells) + " |")
    print()
