"""What ``distill(dry_run=True)`` says of a run before it begins. Imports no torch."""

from dataclasses import dataclass

from adpa.pipeline.training.objectives import ObjectiveName


@dataclass(frozen=True)
class TokenCount:
    """Tokens of the steps to come, over all ranks.

    Attributes:
        mean: of a step.
        most: of the step with the most.
        total: of all steps.
    """

    mean: float
    most: int
    total: int


@dataclass(frozen=True)
class TokenCounts:
    """The tokens of the steps to come.

    Attributes:
        trained: response tokens with a term of the loss.
        prompts: tokens of prompts. A prompt counts with each of its responses.
        computed: tokens that the student computes: with padding; with ``--packing prompts``, shared prompts once.
    """

    trained: TokenCount
    prompts: TokenCount
    computed: TokenCount


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one rank at the peak of a step, in bytes: an estimate, for which no weight was loaded.

    Attributes:
        weights: the student's weights, with adapters.
        gradients: of the trained weights; on several ranks with the copy of DDP.
        optimizer: what the optimizer keeps for the trained weights after its first step.
        activations: what the forward pass of the largest micro-batch keeps for the backward pass; None for a student
            whose forward pass cannot be followed without its weights.
        loss_head: logits of a chunk of tokens, and the gradients that the loss head computes with the loss.
        total: the sum of these. PyTorch itself, the data and gaps between allocations come on top.
        sequences: sequences of the largest micro-batch.
        tokens: tokens that it computes, with padding.
        device: the device of a rank.
        device_memory: its memory; of a CPU, the machine's, which all ranks share.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    loss_head: int
    total: int
    sequences: int
    tokens: int
    device: str
    device_memory: int


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of a sequence as text.

    Attributes:
        text: their text; empty for tokens that are left out.
        trained: whether the loss counts them.
        special: whether it is a special token, or one that ends a response.
        left_out: number of tokens that are left out here.
    """

    text: str
    trained: bool
    special: bool = False
    left_out: int = 0


@dataclass(frozen=True)
class PlannedSequence:
    """A sequence of the first micro-batch.

    Attributes:
        example: number of its example in the micro-batch, from 1.
        response_set: chosen, rejected or sampled.
        terms: weight of each term of the loss on its response; empty if there is none.
        prompt_tokens: tokens of the prompt.
        response_tokens: tokens of the response.
        trained_tokens: those of them with a term of the loss.
        padding: tokens of padding behind it.
        pieces: its text.
    """

    example: int
    response_set: str
    terms: dict[str, float]
    prompt_tokens: int
    response_tokens: int
    trained_tokens: int
    padding: int
    pieces: list[Piece]


@dataclass(frozen=True)
class DistillPlan:
    """What a run would do. Nothing was trained or written.

    Attributes:
        objective: name of the objective.
        output: directory of the trained student.
        scoring: id of the scoring that it learns from; None for sft.
        responses: id of each response set, by name.
        data: the data that they were made from, and when; and of how many versions they are the newest.
        examples: number of preference pairs.
        validation_examples: number of held-out examples.
        steps: optimizer steps in all.
        steps_done: steps before the checkpoint that it resumes from.
        steps_per_epoch: optimizer steps of one pass over the examples.
        batch_size: examples of an optimizer step, over all ranks.
        micro_batch_size: examples in memory at a time.
        ranks: number of ranks.
        parameters: count of the student's numbers, with adapters.
        trained_parameters: count of the numbers that are trained.
        compute_dtype: dtype of the matrix products.
        weights_dtype: dtype of the weights in training.
        tokens: the tokens of the steps to come; None if there is none.
        memory: the memory of a rank; None if there is no step to come.
        first_batch: the first micro-batch of rank 0.
        warnings: warnings of the run.
    """

    objective: ObjectiveName
    output: str
    scoring: str | None
    responses: dict[str, str]
    data: str
    examples: int
    validation_examples: int
    steps: int
    steps_done: int
    steps_per_epoch: int
    batch_size: int
    micro_batch_size: int
    ranks: int
    parameters: int
    trained_parameters: int
    compute_dtype: str
    weights_dtype: str
    tokens: TokenCounts | None
    memory: MemoryEstimate | None
    first_batch: list[PlannedSequence]
    warnings: list[str]
