"""Computes the cost of scoring and training on GPUs from the shapes of the models and stated assumptions.

A decoder multiplies each token with P numbers: its weight matrices without embeddings and head. A head multiplies each
response row with V·d numbers. A multiplication with its addition is two FLOP. In each layer, attention takes
2·n²·heads·head_width multiplications for a sequence of n tokens; this counts the whole square, though a causal kernel
may skip half of it. Training costs three times the forward pass: one product for the result, one for the gradient of
each factor. So does the loss head, which computes its logits once. docs/scaling.md has all formulae.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Doc

from adpa.data.sequences import Packing

FP8, BFLOAT16, FLOAT32 = 1, 2, 4  # bytes
ADAMW_BYTES = 7 * FLOAT32  # reads weight, gradient and two moments; writes weight and two moments
GPUS_OF_A_NODE = 8
SIMULATED_STEPS = 400

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """A decoder like Llama's: grouped-query attention and a gated MLP of three matrices."""

    name: str
    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def matrices(self) -> int:
        """P: the number of weights that multiply every token."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.intermediate)

    @property
    def parameters(self) -> int:
        """All parameters: matrices, norms, biases, embeddings, and the head unless it is tied to the embeddings."""
        norms = (2 * self.layers + 1) * self.width
        biases = self.layers * self.head_width * (self.heads + 2 * self.kv_heads) * self.qkv_bias
        return self.matrices + norms + biases + self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return BFLOAT16 * self.parameters

    def decoder_flops(self, queries: Lengths, keys: Lengths | None = None) -> NDArray[np.float64]:
        """FLOP of a forward pass over ``queries`` tokens that attend to ``keys`` tokens, without the head."""
        attention = 4.0 * self.layers * self.heads * self.head_width
        return 2.0 * self.matrices * queries + attention * queries * (queries if keys is None else keys)

    def head_flops(self, rows: float) -> float:
        """FLOP of the logits of ``rows`` rows."""
        return 2.0 * self.vocabulary * self.width * rows


TEACHERS = (
    Shape("8B", 32, 4096, 14336, 32, 8, 128, 128_256),  # Llama 3.1 8B
    Shape("70B", 80, 8192, 28672, 64, 8, 128, 128_256),  # Llama 3.1 70B
)
STUDENTS = (
    Shape("0.5B", 24, 896, 4864, 14, 2, 64, 151_936, tied=True, qkv_bias=True),  # Qwen2.5 0.5B
    Shape("1.5B", 28, 1536, 8960, 12, 2, 128, 151_936, tied=True, qkv_bias=True),  # Qwen2.5 1.5B
)


@dataclass(frozen=True)
class Assumptions:
    """The assumptions. Every field is an option of ``benchmarks.costs``."""

    pairs: Annotated[int, Doc("preference pairs")] = 60_000
    epochs: Annotated[int, Doc("training passes over all pairs (`--num-train-epochs`, whose default is 1)")] = 3
    batch: Annotated[int, Doc("examples in a step (`--batch-size`, whose default is 32)")] = 128
    micro_batch: Annotated[int, Doc("maximum examples in a micro-batch (`--micro-batch-size`)")] = 4
    packing: Annotated[Packing, Doc("`none` (default) pads a micro-batch; `sequences`; `prompts` (`--packing`)")] = (
        "none"
    )
    peak_flops: Annotated[float, Doc("dense bfloat16 FLOP/s of a GPU (data sheet of an H100 SXM)")] = 989e12
    scoring_share: Annotated[float, Doc("share of the bfloat16 peak that a teacher's decoder reaches")] = 0.4
    head_share: Annotated[
        float, Doc("share of the bfloat16 peak that the scoring head reaches, passes over its logits included")
    ] = 0.5
    training_share: Annotated[float, Doc("share of the bfloat16 peak that training reaches")] = 0.3
    memory: Annotated[float, Doc("bytes of memory of a GPU")] = 80e9
    weights_share: Annotated[float, Doc("share of the memory for a teacher's weights")] = 0.8
    memory_rate: Annotated[float, Doc("bytes/s of a GPU's memory (same sheet)")] = 3.35e12
    memory_share: Annotated[float, Doc("share of the memory rate that decoding and AdamW reach")] = 0.5
    decoding_batch: Annotated[int, Doc("responses that a student samples at once on a GPU")] = 256
    decoding_seconds: Annotated[float, Doc("seconds of a decoding step in addition to reading memory")] = 5e-3
    node_rate: Annotated[float, Doc("bytes/s of an all-reduce between the 8 GPUs of a node")] = 300e9
    network_rate: Annotated[float, Doc("bytes/s of an all-reduce between nodes (one link of 400 Gbit/s)")] = 50e9
    load_rate: Annotated[float, Doc("bytes/s at which a worker loads weights")] = 2e9
    start_seconds: Annotated[float, Doc("seconds to start a worker, in addition to loading")] = 60.0
    block_tokens: Annotated[int, Doc("tokens of a block of scoring (`--batch-tokens` with vLLM)")] = 262_144


@dataclass(frozen=True)
class Responses:
    """Lengths of prompts with one response each, in tokens, [N]."""

    prompt: Lengths
    response: Lengths

    @property
    def whole(self) -> Lengths:
        """Tokens of prompt and response together, [N]."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Pairs:
    """Measured lengths in tokens, [N] each. These N pairs represent all scored pairs."""

    prompt: Lengths
    chosen: Lengths
    rejected: Lengths

    def responses(self) -> list[Responses]:
        """The responses of DCKD: chosen and rejected."""
        return [Responses(self.prompt, self.chosen), Responses(self.prompt, self.rejected)]

    def sampled(self) -> Responses:
        """A student's own responses. They are assumed to be as long as the chosen ones, but at most 512 tokens."""
        return Responses(self.prompt, np.minimum(self.chosen, 512))


def gpus_of_engine(teacher: Shape, assumed: Assumptions, bytes_per_weight: float = BFLOAT16) -> int:
    """Number of GPUs for a teacher: the smallest power of two whose memory holds it."""
    share = teacher.parameters * bytes_per_weight / (assumed.memory * assumed.weights_share)
    return 2 ** max(0, math.ceil(math.log2(share)))


def start_seconds(model: Shape, assumed: Assumptions) -> float:
    """Seconds to start a model."""
    return assumed.start_seconds + model.weight_bytes / assumed.load_rate


def scoring_work(teacher: Shape, sets: Sequence[Responses], assumed: Assumptions) -> float:
    """Seconds of one engine, with ``gpus_of_engine`` GPUs, for one forward pass over these responses of all pairs.

    All GPUs share the decoder. The head then runs on one of them.
    """
    return sum(sum(seconds) for seconds in (_scoring_parts(teacher, responses, assumed) for responses in sets))


def scoring_head_share(teacher: Shape, sets: Sequence[Responses], assumed: Assumptions) -> float:
    """The head's share of ``scoring_work``."""
    head = sum(_scoring_parts(teacher, responses, assumed)[1] for responses in sets)
    return head / scoring_work(teacher, sets, assumed)


def _scoring_parts(teacher: Shape, responses: Responses, assumed: Assumptions) -> tuple[float, float]:
    decoder = teacher.decoder_flops(responses.whole).mean() * assumed.pairs
    head = teacher.head_flops(responses.response.mean()) * assumed.pairs
    gpus = gpus_of_engine(teacher, assumed)
    return (
        float(decoder) / (gpus * assumed.peak_flops * assumed.scoring_share),
        float(head) / (assumed.peak_flops * assumed.head_share),
    )


def scoring_seconds(teacher: Shape, sets: Sequence[Responses], gpus: int, assumed: Assumptions) -> float | None:
    """Upper bound of the wall-clock seconds of ``scoring_work`` on ``gpus`` GPUs; None if the teacher does not fit.

    A free engine takes the next block, so that all engines end within the time of one block.
    """
    engines = gpus // gpus_of_engine(teacher, assumed)
    if engines == 0:
        return None
    work = scoring_work(teacher, sets, assumed)
    tokens = sum(float(responses.whole.mean()) for responses in sets) * assumed.pairs
    block = work * min(1.0, assumed.block_tokens / tokens)
    return start_seconds(teacher, assumed) + work / engines + (1 - 1 / engines) * block


def sampling_seconds(student: Shape, sampled: Responses, assumed: Assumptions) -> float:
    """Seconds of one GPU to sample a response to every prompt. A decoding step reads all weights and caches."""
    prefill = float(student.decoder_flops(sampled.prompt).mean()) * assumed.pairs
    kv_bytes = 2 * BFLOAT16 * student.layers * student.kv_heads * student.head_width
    context = float((sampled.prompt + sampled.response / 2).mean())
    read = student.weight_bytes + assumed.decoding_batch * context * kv_bytes
    step = assumed.decoding_seconds + read / (assumed.memory_rate * assumed.memory_share)
    steps = float(sampled.response.mean()) * assumed.pairs / assumed.decoding_batch
    return start_seconds(student, assumed) + prefill / (assumed.peak_flops * assumed.scoring_share) + steps * step


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, by kind of work."""

    compute: float
    all_reduce: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """The sum: nothing overlaps."""
        return self.compute + self.all_reduce + self.optimizer


def step_seconds(student: Shape, sets: Sequence[Responses], gpus: int, assumed: Assumptions) -> Step | None:
    """A data-parallel optimizer step; None if ``--batch-size`` is no multiple of the ranks, which adpa refuses."""
    if assumed.batch % gpus:
        return None
    rate = assumed.node_rate if gpus <= GPUS_OF_A_NODE else assumed.network_rate
    return Step(
        slowest_rank_flops(student, sets, gpus, assumed) / (assumed.peak_flops * assumed.training_share),
        2 * FLOAT32 * student.parameters * (gpus - 1) / gpus / rate,
        ADAMW_BYTES * student.parameters / (assumed.memory_rate * assumed.memory_share),
    )


def slowest_rank_flops(student: Shape, sets: Sequence[Responses], gpus: int, assumed: Assumptions) -> float:
    """Mean FLOP of the slowest rank in a step, with the padding that ``packing`` leaves.

    The steps draw their examples from the measured pairs.
    """
    per_rank = assumed.batch // gpus
    micro = max(size for size in range(1, assumed.micro_batch + 1) if per_rank % size == 0)
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(sets[0].prompt), (SIMULATED_STEPS, assumed.batch))
    drawn = drawn.reshape(SIMULATED_STEPS, gpus, per_rank // micro, micro)  # steps, ranks, micro-batches, examples
    rows = sum(responses.response[drawn].sum(axis=-1) for responses in sets)
    flops = 3 * (_decoder_flops(student, sets, drawn, assumed.packing) + student.head_flops(1) * rows)
    return float(flops.sum(axis=-1).max(axis=-1).mean())


def _decoder_flops(student: Shape, sets: Sequence[Responses], drawn: Lengths, packing: Packing) -> NDArray[np.float64]:
    """FLOP of a forward pass over each micro-batch. The last axis of ``drawn`` holds its examples."""
    if packing == "none":
        longest = np.max([responses.whole[drawn].max(axis=-1) for responses in sets], axis=0)
        return len(sets) * drawn.shape[-1] * student.decoder_flops(longest)
    first, *others = (
        student.decoder_flops(responses.whole)
        if number == 0 or packing == "sequences"
        else student.decoder_flops(responses.response, responses.whole)
        for number, responses in enumerate(sets)
    )
    return sum(others, first)[drawn].sum(axis=-1)


def needed_flops(student: Shape, sets: Sequence[Responses], assumed: Assumptions) -> float:
    """FLOP of a step without padding. Every response counts with its prompt."""
    forward = sum(
        float(student.decoder_flops(responses.whole).mean()) + student.head_flops(float(responses.response.mean()))
        for responses in sets
    )
    return 3 * assumed.batch * forward


def training_seconds(student: Shape, sets: Sequence[Responses], gpus: int, assumed: Assumptions) -> float | None:
    """Wall-clock seconds of a training run; None if ``step_seconds`` is None."""
    step = step_seconds(student, sets, gpus, assumed)
    if step is None:
        return None
    steps = assumed.epochs * math.ceil(assumed.pairs / assumed.batch)
    return start_seconds(student, assumed) + steps * step.seconds


@dataclass(frozen=True)
class GpuHours:
    """GPU-hours of n students: ``shared`` from one cache, ``live`` with the teacher in every epoch of every run."""

    shared: float
    live: float


def dckd_gpu_hours(teacher: Shape, student: Shape, pairs: Pairs, students: int, assumed: Assumptions) -> GpuHours:
    """n DCKD runs. All students share the teacher's signals. A student trains on one GPU."""
    start, scoring = _teacher_gpu_seconds(teacher, pairs.responses(), assumed)
    training = _training_gpu_seconds(student, pairs.responses(), assumed)
    return GpuHours(
        (start + scoring + students * training) / 3600,
        students * (start + assumed.epochs * scoring + training) / 3600,
    )


def adpa_gpu_hours(teacher: Shape, student: Shape, pairs: Pairs, students: int, assumed: Assumptions) -> GpuHours:
    """n ADPA runs that start from trained students. Each student samples; teacher and reference score its samples.

    Students share no signals. With a cache, every epoch reads the same signals again.
    """
    sampled = pairs.sampled()
    start, scoring = _teacher_gpu_seconds(teacher, [sampled], assumed)
    student_seconds = sampling_seconds(student, sampled, assumed)
    student_seconds += _training_gpu_seconds(student, [Responses(pairs.prompt, pairs.chosen), sampled], assumed)
    return GpuHours(
        students * (2 * (start + scoring) + student_seconds) / 3600,
        students * (2 * (start + assumed.epochs * scoring) + student_seconds) / 3600,
    )


def _teacher_gpu_seconds(teacher: Shape, sets: Sequence[Responses], assumed: Assumptions) -> tuple[float, float]:
    gpus = gpus_of_engine(teacher, assumed)
    return gpus * start_seconds(teacher, assumed), gpus * scoring_work(teacher, sets, assumed)


def _training_gpu_seconds(student: Shape, sets: Sequence[Responses], assumed: Assumptions) -> float:
    seconds = training_seconds(student, sets, 1, assumed)
    assert seconds is not None, "any batch is a multiple of one rank"
    return seconds
