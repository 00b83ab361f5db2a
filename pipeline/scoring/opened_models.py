"""Opens the models of stage one and checks them against one another and against the data, before the long work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from adpa.data.cache.responses import ResponseName, Sampling
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.data.encoding import EncodedPair
from adpa.data.vocabulary import check_same_vocabulary
from adpa.errors import OptionError
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.options import DtypeName, ModelName
from adpa.pipeline.scoring.engine import Engine
from adpa.pipeline.scoring.inputs import teachers_weights
from adpa.pipeline.scoring.sample import SharedSampler
from adpa.pipeline.scoring.score import Scorer


@dataclass(frozen=True)
class Models:
    """The models of a run. They can be pickled; another process loads them from the same directories."""

    teacher: Checkpoint
    reference: Checkpoint | None
    student: Checkpoint | None

    def with_student(self, name: str) -> "Models":
        """The same teacher and reference, and another student.

        Raises:
            AdpaError: its checkpoint is missing or has another vocabulary.
        """
        student = open_checkpoint(
            name,
            attn_implementation=self.teacher.attn_implementation,
            trust_remote_code=self.teacher.trust_remote_code,
        )
        check_same_vocabulary(self.teacher.tokenizer, student.tokenizer, self.teacher.name, student.name)
        return replace(self, student=student)

    def by_name(self) -> dict[ModelName, Checkpoint]:
        """The models of this run by their names."""
        models: dict[ModelName, Checkpoint | None] = {
            "teacher": self.teacher,
            "reference": self.reference,
            "student": self.student,
        }
        return {name: checkpoint for name, checkpoint in models.items() if checkpoint is not None}

    def dtypes(self, dtype: DtypeName) -> dict[ModelName, str]:
        """The dtype of each model's computation. The reference takes the teacher's, so that the two can be compared."""
        return {
            model: (checkpoint if model == "student" else self.teacher).dtype_name(dtype)
            for model, checkpoint in self.by_name().items()
        }

    def check_reference(self) -> None:
        """Checks that the reference is not the teacher.

        Raises:
            OptionError: both have the same weights.
        """
        if self.reference is not None and self.reference.identity.digest == self.teacher.identity.digest:
            raise teachers_weights(self.reference.name)

    def check_data(
        self, pairs: Sequence[EncodedPair], names: Sequence[ResponseName], new_tokens: int, engine: Engine
    ) -> int:
        """Checks token ids and lengths. Returns the largest number of tokens that a sequence can have.

        Raises:
            AdpaError: a model has no embedding for an id or no position for a token, or a sequence is too long.
        """
        largest, lengths = 0, []
        for pair in pairs:
            response = {"chosen": len(pair.chosen_ids), "rejected": len(pair.rejected_ids), "sampled": new_tokens}
            lengths += [len(pair.prompt_ids) + response[name] for name in names]
            texts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)  # a prompt alone has no responses
            largest = max(largest, *(int(ids.max()) for ids in texts if ids.size))
        for model, checkpoint in self.by_name().items():
            extra = 0 if model == "student" else engine.extra_positions
            checkpoint.check_positions([length + extra for length in lengths])
            checkpoint.check_ids(largest)
        limit = engine.max_tokens
        if limit is not None and max(lengths) > limit:
            longer = sum(length > limit for length in lengths)
            raise OptionError(
                f"--max-model-len: {longer} of {len(lengths)} sequences have more than {limit} tokens, "
                f"up to {max(lengths)}",
                "raise it, or lower --max-length, --max-prompt-length or --max-new-tokens",
            )
        return max(lengths)

    def open_scorer(self, engine: Engine, longest: int, scoring: Scoring, identity: ModelIdentity) -> Scorer:
        """Loads the model with this identity for sequences of up to ``longest`` tokens."""
        checkpoint = next(checkpoint for checkpoint in self.by_name().values() if checkpoint.identity == identity)
        checkpoint.check_here()
        return engine.open_scorer(checkpoint, scoring, longest)

    def open_sampler(self, engine: Engine, longest: int, sampling: Sampling) -> SharedSampler:
        """Loads the student for prompts and responses of up to ``longest`` tokens together."""
        assert self.student is not None
        self.student.check_here()
        return engine.open_sampler(self.student, sampling, longest)


def open_models(
    teacher: str,
    reference: str | None,
    student: str | None,
    top_k: int,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Models:
    """Opens the checkpoints and checks that all have the teacher's vocabulary.

    The last two arguments are those of ``open_checkpoint``, for all models.

    Raises:
        AdpaError: a checkpoint is missing or has another vocabulary, or the vocabulary has fewer than K tokens.
    """
    open_one = partial(open_checkpoint, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    models = Models(
        open_one(teacher),
        open_one(reference) if reference else None,
        open_one(student) if student else None,
    )
    for other in list(models.by_name().values())[1:]:
        check_same_vocabulary(models.teacher.tokenizer, other.tokenizer, teacher, other.name)
    if top_k > models.teacher.config.vocab_size:
        raise OptionError(f"--top-k {top_k}: {teacher} has {models.teacher.config.vocab_size} tokens", "lower --top-k")
    return models
