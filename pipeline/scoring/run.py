"""Carries a plan out: samples, writes the response sets, scores; a dry run only counts, or probes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from adpa.data.cache.format import prepare_cache
from adpa.data.cache.locations import Location
from adpa.data.cache.responses import ResponseName, ResponseSet, write_response_set
from adpa.data.cache.samples import SampleRequest, missing_requests, read_samples
from adpa.data.cache.selection import complete_groups
from adpa.data.cache.shards import list_shards
from adpa.data.cache.signals import Scoring, peek_signals, read_signals
from adpa.data.cache.tokenizers import write_tokenizer
from adpa.data.reward_accuracy import RewardAccuracy, stored_rewards
from adpa.data.sequences import TokenSequence
from adpa.errors import OptionError
from adpa.pipeline.scoring.other_runs import Alarm
from adpa.pipeline.scoring.plan import Plan, Setup
from adpa.pipeline.scoring.probe import ProbeReport, Work, probe_signals
from adpa.pipeline.scoring.request import Request
from adpa.pipeline.scoring.resumed import Resumed, count_samples, count_sequences, peek_sets
from adpa.pipeline.scoring.sample import complete_samples
from adpa.pipeline.scoring.score import Scored, read_pending, score

PAIR: tuple[ResponseName, ResponseName] = ("chosen", "rejected")


@dataclass(frozen=True)
class Outcome:
    """What a run did; of a dry run, what is to be done.

    Attributes:
        sets: the response sets, the sampled one with the responses that are sampled already.
        finished: those of them that are whole.
        unsampled: responses that the cache lacked before the run.
        awaited: responses that other parts of the data have still to sample.
        wanted: the sequences that the part scores.
        missing: those whose signals the cache lacked before the run.
        scored: those of them that the run scored, and not another process in the meantime; of a dry run, all.
        bytes: size of the files with their signals.
        resumed: what a stopped run had done.
    """

    sets: Mapping[ResponseName, ResponseSet]
    finished: Mapping[ResponseName, ResponseSet]
    unsampled: Sequence[SampleRequest]
    awaited: int
    wanted: Sequence[TokenSequence]
    missing: Sequence[TokenSequence]
    scored: Sequence[TokenSequence]
    bytes: int
    resumed: Resumed


def run_plan(request: Request, setup: Setup, plan: Plan) -> Outcome:
    """Samples, writes and scores what the cache lacks; a dry run only counts it.

    Raises:
        AdpaError: a file of the cache is damaged, samples disappear, or the engine fails.
    """
    cache, alarm = request.cache, Alarm()
    earlier = peek_sets(list_shards(cache / "responses"))  # now: this run may replace their files
    if not request.dry_run:
        prepare_cache(cache)
    sets, unsampled, awaited, samples_left = dict(plan.sets), list[SampleRequest](), 0, 0
    with request.executor.open(setup.engine.gpus, cache) as execute:
        if (sampling := plan.sampling) is not None:
            own_samples, answers = plan.own_samples(), read_samples(cache, sampling)
            unsampled = missing_requests(answers, own_samples)
            samples_left = count_samples(earlier, own_samples, answers) if unsampled and answers else 0
            if not request.dry_run:
                open_sampler = partial(setup.models.open_sampler, setup.engine, plan.longest, sampling)
                answers = complete_samples(
                    cache, sampling, own_samples, unsampled, open_sampler, setup.sampling_tokens, execute, alarm
                )
            sets["sampled"] = plan.sampled_set(answers)
            others = {sample.key for _, sample in plan.samples if sample.prompt_ids not in plan.own}
            awaited = len(others - answers.keys())
        # A set is never made of some of its samples: the part that samples last makes it.
        finished = {name: one for name, one in sets.items() if name != "sampled" or not awaited}
        if not request.dry_run:  # before the search for what is missing: no gc removes rows that a set needs
            for responses in finished.values():
                write_response_set(cache, responses)
            write_tokenizer(cache, plan.encoder.template.tokenizer, plan.info.tokenizer)
        wanted = plan.sequences(sets)
        missing, rows_left = _missing(cache, plan.scoring, wanted, earlier)
        if request.dry_run:
            pending = read_pending(cache, plan.scoring).keys()
            halves = sum(sequence.key in pending for sequence in missing)
            done = Scored({sequence.key for sequence in missing}, halves, 0)
        else:
            open_scorer = partial(setup.models.open_scorer, setup.engine, plan.longest, plan.scoring)
            done = score(cache, plan.scoring, missing, open_scorer, setup.scoring_tokens, execute, alarm)
    return Outcome(
        sets=sets,
        finished=finished,
        unsampled=unsampled,
        awaited=awaited,
        wanted=wanted,
        missing=missing,
        scored=[sequence for sequence in missing if sequence.key in done.keys],
        bytes=done.bytes,
        resumed=Resumed(rows_left, done.halves, samples_left),
    )


def _missing(
    cache: Location, scoring: Scoring, wanted: Sequence[TokenSequence], earlier: Sequence[ResponseSet]
) -> tuple[list[TokenSequence], int]:
    """The sequences without a signal row, and how many of the others a stopped run scored.

    Args:
        cache: the cache's directory.
        scoring: the scoring of the run.
        wanted: distinct sequences.
        earlier: the response sets that the cache had before the run.
    """
    signals = read_signals(cache, scoring)
    present = signals.keys()
    missing = [sequence for sequence in wanted if sequence.key not in present]
    reused = [sequence.key for sequence in wanted if sequence.key in present]
    return missing, count_sequences(earlier, signals, reused) if missing and reused else 0


def measure_rewards(request: Request, plan: Plan, outcome: Outcome) -> RewardAccuracy | None:
    """The reward accuracy of the part's pairs whose two responses have signals; None without a reference or a pair.

    A run that scores one response of the pairs finds the other one in the cache, if an earlier run scored it.

    Raises:
        DamagedFileError: a row of the cache cannot be decoded.
    """
    named = next((name for name in PAIR if name in plan.names), None)
    if plan.scoring.reference is None or named is None:
        return None
    others = peek_sets(list_shards(request.cache / "responses", "rejected")) if "rejected" not in plan.sets else []
    groups = complete_groups([*plan.sets.values(), *others], PAIR)
    if not groups:
        return None
    keys = {name: responses.table["key"] for name, responses in groups[0].items()}
    own = pc.is_in(keys[named], value_set=pa.array([sequence.key for sequence in outcome.wanted], pa.binary(16)))
    chosen, rejected = (keys[name].filter(own) for name in PAIR)
    return stored_rewards(chosen, rejected, peek_signals(request.cache, plan.scoring))


def probe_plan(request: Request, count: int, setup: Setup, plan: Plan, outcome: Outcome) -> ProbeReport:
    """Scores so many of the wanted responses in memory, after a dry run.

    Raises:
        AdpaError: there is no response yet, or the engine fails.
    """
    models = setup.models
    stand_ins = plan.sets["chosen"].sequences() if "chosen" in plan.sets else []
    if not outcome.wanted and not stand_ins:
        raise OptionError(
            f"--probe {count}: the data has prompts alone, and the student has sampled no response to them yet",
            "leave --probe out, or give it preference pairs",
        )
    chosen, rejected = (plan.sets[name].sequences() if plan.compares_responses else [] for name in PAIR)
    return probe_signals(
        count,
        Work(
            outcome.wanted,
            outcome.missing,
            outcome.unsampled,
            request.sampling.max_new_tokens,
            list(zip(chosen, rejected, strict=True)),
        ),
        stand_ins,
        plan.scoring,
        partial(models.open_scorer, setup.engine, plan.longest),
        student=models.student.identity if models.student else None,
        vocabulary=models.teacher.config.vocab_size,
        batch_tokens=setup.scoring_tokens,
        pads=setup.engine.pads,
    )
