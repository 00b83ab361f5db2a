"""Two students answer the same prompts, teacher and reference judge their answers: each model is loaded once.

While a student is loaded, it samples, answers greedily and scores the responses of the data. In transformers one load
serves all of this. vLLM needs one engine to sample and another one to score; each is started once. Then the teacher
scores the answers of both students, and then the reference. So one model at a time is in memory.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from adpa.data.cache.format import prepare_cache
from adpa.data.cache.locations import Location
from adpa.data.cache.responses import ResponseSet, Sampling, write_response_set
from adpa.data.cache.samples import missing_requests, read_samples
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.data.cache.tokenizers import write_tokenizer
from adpa.pipeline.scoring.other_runs import Alarm
from adpa.pipeline.scoring.plan import Pairs, Plan, Setup, plan_pairs
from adpa.pipeline.scoring.request import Request
from adpa.pipeline.scoring.sample import Sampler, SharedSampler, complete_samples
from adpa.pipeline.scoring.score import Scorer, missing_sequences, score


@dataclass(frozen=True)
class Contestant:
    """A student of a comparison, and its work.

    Attributes:
        setup: the models, with this student.
        answers: the plan of its sampled answers.
        pairs: the plan of the responses of the data, chosen and rejected.
    """

    setup: Setup
    answers: Plan
    pairs: Plan

    @property
    def ways(self) -> tuple[Plan, Plan]:
        """The plans of its sampled and of its greedy answers; the same one at temperature 0."""
        plan = self.answers
        assert plan.sampling is not None
        if plan.sampling.temperature == 0:
            return plan, plan
        sampling = replace(plan.sampling, temperature=0.0, top_p=1.0, samples_per_prompt=1, seed=0)
        return plan, replace(plan, sampling=sampling, samples=[one for one in plan.samples if one[1].index == 0])

    @property
    def scoring(self) -> Scoring:
        """The scoring of the data's responses by this student alone."""
        student, sampling = self.setup.models.student, self.answers.sampling
        assert student is not None
        assert sampling is not None
        engine = self.setup.engine.student_name
        common = replace(self.answers.scoring, dtype=sampling.dtype, engine=engine)
        return replace(common, teacher=student.identity, reference=None)


@dataclass(frozen=True)
class Answered:
    """What a student said.

    Attributes:
        sampled: its sampled answers.
        greedy: its greedy answers; the same set at temperature 0.
        sampled_now: how many of the sampled answers are new; 0 at temperature 0.
        greedy_now: how many of the greedy answers are new.
        scored_now: how many responses of the data it scored now.
    """

    sampled: ResponseSet
    greedy: ResponseSet
    sampled_now: int
    greedy_now: int
    scored_now: int


def make_contestant(request: Request, setup: Setup, data: Pairs) -> Contestant:
    """Plans the work of the setup's student.

    Raises:
        AdpaError: a model cannot read the data.
    """
    pairs = replace(request, names=["chosen", "rejected"])
    return Contestant(setup, plan_pairs(request, setup, data), plan_pairs(pairs, setup, data))


def compare_students(cache: Location, contestants: Sequence[Contestant]) -> tuple[list[Answered], int]:
    """Samples and scores what the cache lacks.

    Returns:
        What each student said; and the number of answers that teacher and reference scored now.

    Raises:
        AdpaError: a file of the cache is damaged, samples disappear, or the engine fails.
    """
    prepare_cache(cache)
    alarm = Alarm()
    answered = [_ask(cache, one, alarm) for one in contestants]
    setup, plan = contestants[0].setup, contestants[0].answers
    sequences = [sequence for one in answered for said in (one.sampled, one.greedy) for sequence in said.sequences()]
    open_scorer = partial(setup.models.open_scorer, setup.engine, plan.longest, plan.scoring)
    missing = missing_sequences(cache, plan.scoring, sequences)
    done = score(cache, plan.scoring, missing, open_scorer, setup.scoring_tokens, alarm=alarm)
    return answered, len(done.keys)


def _ask(cache: Location, student: Contestant, alarm: Alarm) -> Answered:
    """Lets a student answer, and score the responses of the data."""
    setup, pairs = student.setup, student.pairs
    sets, new = list[ResponseSet](), list[int]()
    with closing(OneLoad(student)) as load:
        for plan in student.ways:
            assert plan.sampling is not None
            samples = plan.own_samples()
            missing = missing_requests(read_samples(cache, plan.sampling), samples)
            open_sampler = partial(load.open_sampler, plan.sampling)
            answers = complete_samples(
                cache, plan.sampling, samples, missing, open_sampler, setup.sampling_tokens, alarm=alarm
            )
            sets.append(plan.sampled_set(answers))
            new.append(len(missing))
        for responses in (*pairs.sets.values(), *sets):
            write_response_set(cache, responses)
        write_tokenizer(cache, pairs.encoder.template.tokenizer, pairs.info.tokenizer)
        unscored = missing_sequences(cache, student.scoring, pairs.sequences(pairs.sets))
        tokens = setup.scoring_tokens
        done = score(cache, student.scoring, unscored, load.open_scorer, tokens, alarm=alarm, judge="student")
    if sets[0].info.sampling == sets[1].info.sampling:  # what was new for the first plan is greedy
        new.reverse()
    return Answered(sets[0], sets[1], new[0], new[1], len(done.keys))


class OneLoad:
    """A student that samples and then scores, loaded when it is first asked for, and once where the engine permits."""

    def __init__(self, student: Contestant) -> None:
        self._student = student
        self._sampler: SharedSampler | None = None

    def open_sampler(self, sampling: Sampling) -> Sampler:
        """The student as a sampler; closing it keeps the student loaded."""
        setup = self._student.setup
        if self._sampler is None:
            self._sampler = setup.models.open_sampler(setup.engine, self._student.answers.longest, sampling)
        return _StaysLoaded(self._sampler.with_sampling(sampling))

    def open_scorer(self, _: ModelIdentity) -> Scorer:
        """The student as a scorer; it samples no more."""
        scorer = self._sampler.as_scorer() if self._sampler else None
        self.close()
        if scorer is not None:
            return scorer
        setup, plan = self._student.setup, self._student.pairs
        assert setup.models.student is not None
        # The scoring of teacher and reference, so that the engine takes the model for neither of them.
        scoring = replace(plan.scoring, dtype=self._student.scoring.dtype)
        return setup.engine.open_scorer(setup.models.student, scoring, plan.longest)

    def close(self) -> None:
        """Frees the memory of a student that has not become a scorer."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None


class _StaysLoaded:
    """A ``Sampler`` whose model stays loaded when a job is done with it."""

    def __init__(self, sampler: Sampler) -> None:
        self.sample = sampler.sample

    def close(self) -> None:
        """Frees nothing."""
