"""The probe: it writes nothing, agrees with a dense forward pass, and predicts the cost of the run."""

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import Models
from tests.pipeline.conftest import Filled, dense_logprobs, synthetic

from adpa import precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import ModelIdentity, Scoring, read_scorings
from adpa.data.fidelity import cut_row
from adpa.data.reward_accuracy import RewardAccuracy
from adpa.data.sequences import TokenSequence
from adpa.errors import OptionError
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.scoring.hf_scorer import open_hf_scorer
from adpa.pipeline.scoring.probe import ProbeReport, Work, probe_signals
from adpa.pipeline.scoring.score import Batch, ReferenceLogprobs, Scorer, score_reference, score_teacher

pytestmark = pytest.mark.slow


def options(filled: Filled, cache: Path, **others: Any) -> dict[str, Any]:
    models = {"teacher": str(filled.models.teacher), "reference": str(filled.models.reference)}
    return {**models, "data": str(filled.data), "cache": cache, **others}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe with K = 200 instead of 1,000."""
    monkeypatch.setattr("adpa.pipeline.scoring.probe.PROBE_TOP_K", 200)


def probe(filled: Filled, cache: Path, count: int, **others: Any) -> ProbeReport:
    probed = precompute(**options(filled, cache, **others), dry_run=True, probe=count).probe
    assert probed is not None
    return probed


def sequences_of(filled: Filled, *names: str) -> list[TokenSequence]:
    """The distinct sequences of these response sets."""
    sets = [found for found in read_response_sets(filled.cache) if found.info.name in names]
    return list({sequence.key: sequence for found in sets for sequence in found.sequences()}.values())


def test_a_probe_of_everything_predicts_the_size_of_the_files_and_writes_none(filled: Filled, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    probed = probe(filled, cache, 1000, top_k=7, batch_tokens=200)
    assert not cache.exists()
    sequences = sequences_of(filled, "chosen", "rejected")
    assert (probed.responses, probed.data_responses) == (16, 16)
    assert probed.tokens == probed.data_tokens == sum(len(sequence.response_ids) for sequence in sequences)
    assert probed.input_tokens == sum(map(len, sequences))
    assert [kept.top_k for kept in probed.by_top_k] == [7, 10, 20, 50, 100]
    for kept in probed.by_top_k[:2]:
        precompute(**options(filled, cache, top_k=kept.top_k, batch_tokens=200))
        (scoring,) = (scoring for scoring in read_scorings(cache) if scoring.top_k == kept.top_k)
        shards = list((cache / "scorings" / scoring.id).glob("signals-*.arrow"))
        assert len(shards) > 1
        assert kept.bytes == sum(path.stat().st_size for path in shards)


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({}, id="exact"),
        pytest.param({"top_p": 0.1}, id="a nucleus", marks=pytest.mark.slow),
        pytest.param({"lossy": True}, id="lossy", marks=pytest.mark.slow),
    ],
)
def test_the_summary_has_the_bytes_that_the_probe_predicts_for_what_is_missing(
    others: dict[str, Any], filled: Filled, tmp_path: Path
) -> None:
    given = options(filled, tmp_path / "cache", top_k=20, **others)
    predicted, at_most = (precompute(**given, dry_run=True, probe=count) for count in (1000, None))
    assert predicted.probe is not None
    assert [predicted.bytes] == [kept.bytes for kept in predicted.probe.by_top_k if kept.top_k == 20]
    done = precompute(**given)
    assert predicted.bytes == done.bytes < at_most.bytes
    again = precompute(**given, dry_run=True, probe=3)
    assert (again.tokens, again.bytes) == (0, 0)


def test_what_is_kept_and_lost_is_what_a_dense_forward_says(filled: Filled, tmp_path: Path) -> None:
    probed = probe(filled, tmp_path / "cache", 1000)
    tails: dict[int, list[float]] = {kept.top_k: [] for kept in probed.by_top_k}
    lost: dict[int, list[float]] = {kept.top_k: [] for kept in probed.by_top_k}
    for sequence in sequences_of(filled, "chosen", "rejected"):
        teacher_TV, reference_TV = (
            dense_logprobs(model, sequence).astype(np.float64)
            for model in (filled.models.teacher, filled.models.reference)
        )
        order = np.argsort(-teacher_TV, axis=1, kind="stable")
        p, q = (np.exp(np.take_along_axis(logprobs, order, axis=1)) for logprobs in (teacher_TV, reference_TV))
        for top_k in tails:
            tails[top_k] += p[:, top_k:].sum(axis=1).tolist()
            kl_large, kl_small = (kl_of_outcomes(p, q, outcomes) for outcomes in (probed.top_k, top_k))
            lost[top_k] += (kl_large - kl_small).tolist()
    for kept in probed.by_top_k:
        assert kept.tail == pytest.approx(np.mean(tails[kept.top_k]), abs=1e-5)
        assert kept.captured_mass_5 == pytest.approx(1 - np.quantile(tails[kept.top_k], 0.95), abs=0.02)
        assert kept.kl_lost == pytest.approx(np.mean(lost[kept.top_k]), abs=1e-4)
        assert np.mean(lost[kept.top_k]) > 0.001


def kl_of_outcomes(p_TV: NDArray[np.float64], q_TV: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """KL [T] over the first K columns and the sum of the others."""
    p, q = (np.column_stack([given[:, :top_k], given[:, top_k:].sum(axis=1)]) for given in (p_TV, q_TV))
    return (p * np.log(p / q)).sum(axis=1)


def test_a_row_of_the_probe_cut_to_k_is_what_a_run_with_k_says(models: Models, filled: Filled) -> None:
    teacher, reference = open_checkpoint(str(models.teacher)), open_checkpoint(str(models.reference))
    narrow = Scoring(teacher.identity, reference.identity, "v", 10, "float32", "hf")
    batches = [sequences_of(filled, "chosen")[:4], sequences_of(filled, "rejected")[:3]]
    scored = []
    for scoring in (narrow, replace(narrow, top_k=200)):
        shards = score_teacher(open_hf_scorer(teacher, "float32", torch.device("cpu")), batches, scoring)
        rows = {row.key: row for shard in shards for row in shard}
        scorer = open_hf_scorer(reference, "float32", torch.device("cpu"))
        whole = score_reference(scorer, batches, lambda batch, rows=rows: [rows[s.key] for s in batch], scoring)  # type: ignore[misc]
        scored.append([row for shard in whole for row in shard])
    for own, large in zip(*scored, strict=True):
        (found,) = cut_row(large, [10])
        np.testing.assert_array_equal(found.topk_ids, own.topk_ids)
        for name in ("token_logprobs", "topk_logprobs", "tail_logprob", "token_advantages", "topk_advantages"):
            np.testing.assert_allclose(getattr(found, name), getattr(own, name), atol=1e-5)


def test_with_a_student_the_kl_is_its_own(filled: Filled, tmp_path: Path) -> None:
    student = str(filled.models.student)
    of_student = probe(filled, tmp_path, 3, student=student, responses="chosen,sampled", max_new_tokens=6)
    # A run with the student as reference gives the same ratios.
    as_reference = probe(filled, tmp_path, 3, reference=student, responses="chosen")
    assert (of_student.kl_against, as_reference.kl_against) == ("student", "reference")
    for one, other in zip(of_student.by_top_k, as_reference.by_top_k, strict=True):
        assert one.kl_lost == pytest.approx(other.kl_lost, rel=1e-4)
        assert one.advantage_lost != other.advantage_lost


def test_without_a_reference_a_probe_says_nothing_of_kl_and_advantages(filled: Filled, tmp_path: Path) -> None:
    probed = probe(filled, tmp_path / "cache", 3, reference=None)
    assert (probed.reference_hours, probed.kl_against) == (None, None)
    assert all(kept.kl_lost is None and kept.advantage_lost is None for kept in probed.by_top_k)
    assert probed.missing_hours == probed.teacher_hours > 0


def test_a_complete_cache_is_probed_and_not_touched(filled: Filled, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled.cache, cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    probed = probe(filled, cache, 5, top_k=10)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert (probed.responses, probed.data_responses, probed.missing_hours) == (5, 16, 0)
    assert probed.teacher_hours > 0


def test_chosen_responses_stand_in_for_those_that_are_not_sampled_yet(filled: Filled, tmp_path: Path) -> None:
    sampled: dict[str, Any] = {"student": str(filled.models.student), "samples_per_prompt": 2, "max_new_tokens": 3}
    probed = probe(filled, tmp_path / "cache", 64, **sampled)
    assert probed.stand_ins
    assert (probed.responses, probed.tokens) == (8, 8 * 3)
    assert (probed.data_responses, probed.data_tokens) == (16, 16 * 3)
    assert not probe(filled, tmp_path / "cache", 2, **sampled, responses="chosen,sampled").stand_ins


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"probe": 64}, "--probe 64 without --dry-run"),
        ({"probe": 0, "dry_run": True}, "--probe 0; expected at least 1"),
    ],
)
def test_a_probe_that_cannot_be_is_refused(
    others: dict[str, Any], message: str, filled: Filled, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        precompute(**options(filled, tmp_path / "cache"), **others)
    assert not (tmp_path / "cache").exists()


SCORING = Scoring(ModelIdentity("teacher", None, "a"), ModelIdentity("reference", None, "b"), "v", 3, "float32", "hf")
SLOW, FAST = 0.25, 0.01


@dataclass
class Engine:
    """Opens slow scorers, one at a time. Their first pass is even slower."""

    asked: list[str] = field(default_factory=list)
    loaded: int = 0

    def open(self, scoring: Scoring, identity: ModelIdentity) -> Scorer:
        assert self.loaded == 0, "two models in memory at once"
        self.loaded = 1
        time.sleep(SLOW)
        return WarmingUp(self, identity.name)


@dataclass
class WarmingUp:
    engine: Engine
    name: str
    warm: bool = False

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        self.work(top_k)
        for batch in batches:
            yield [
                SignalRow(
                    sequence.key,
                    np.full(len(sequence.response_ids), -1, np.float32),
                    np.tile(np.arange(top_k, dtype=np.int32), (len(sequence.response_ids), 1)),
                    np.full((len(sequence.response_ids), top_k), -np.log(100), np.float32),
                    np.full(len(sequence.response_ids), np.log1p(-top_k / 100), np.float32),
                )
                for sequence in batch
            ]

    def logprobs_at(
        self, batches: Sequence[Batch], topk_ids: Iterable[Sequence[NDArray[np.int32]]]
    ) -> Iterator[list[ReferenceLogprobs]]:
        self.work()
        for ids in topk_ids:
            yield [(np.full(len(own), -2, np.float32), np.full(own.shape, -5, np.float32)) for own in ids]

    def close(self) -> None:
        self.engine.loaded = 0

    def work(self, top_k: int | None = None) -> None:
        self.engine.asked.append(f"{self.name} {top_k}")
        time.sleep(FAST if self.warm else SLOW)
        self.warm = True


def probe_with(
    engine: Engine, requested: Sequence[TokenSequence], missing: Sequence[TokenSequence], **others: Any
) -> Any:
    return probe_signals(
        others.pop("count", 64),
        Work(requested, missing, [], 8, others.pop("pairs", ())),
        requested,
        SCORING,
        engine.open,
        vocabulary=90,
        batch_tokens=24,
        student=others.pop("student", None),
        pads=others.pop("pads", False),
    )


def test_neither_loading_nor_warming_up_is_counted() -> None:
    engine = Engine()
    sequences = [synthetic([1, 2], [number, 4]) for number in range(6)]
    probed = probe_with(engine, sequences, sequences)
    assert engine.asked == ["teacher 90", "teacher 3", "reference None", "reference None"]
    assert FAST <= probed.teacher_hours * 3600 < SLOW
    assert FAST <= probed.reference_hours * 3600 < SLOW
    assert probed.missing_hours == pytest.approx(probed.teacher_hours + probed.reference_hours)


def test_a_student_is_opened_last_and_asked_once() -> None:
    engine = Engine()
    sequences = [synthetic([1, 2], [number, 4]) for number in range(6)]
    probe_with(engine, sequences, sequences, student=ModelIdentity("student", None, "c"))
    assert engine.asked[2:] == ["reference None", "reference None", "student None"]


def test_a_small_vocabulary_bounds_what_is_compared() -> None:
    sequences = [synthetic([1], [2, 3])]
    probed = probe_with(Engine(), sequences, sequences)
    assert probed.top_k == 90
    assert [kept.top_k for kept in probed.by_top_k] == [3, 10, 20, 50]


@pytest.mark.parametrize(("pads", "share"), [(False, 10 / 18), (True, 16 / 24)])
def test_hours_are_of_the_tokens_that_the_engine_runs_over(pads: bool, share: float) -> None:
    sequences = [synthetic([1, 2, 3], [number] * length) for number, length in ((4, 5), (5, 5))]
    sequences.append(synthetic([1], [2]))
    probed = probe_with(Engine(), sequences, sequences[1:], pads=pads)
    assert probed.missing_hours / (probed.teacher_hours + probed.reference_hours) == pytest.approx(share)


def test_the_probed_are_spread_over_all_lengths_whatever_the_order_of_the_data() -> None:
    sequences = [synthetic([7], range(10, 10 + length)) for length in range(1, 21)]
    there, back = (probe_with(Engine(), given, given, count=4) for given in (sequences, sequences[::-1]))
    assert there.tokens == back.tokens == 3 + 8 + 13 + 18
    assert there.responses == 4


def pair(prompt: int, chosen: int, rejected: int) -> tuple[TokenSequence, TokenSequence]:
    """Two responses of so many tokens; the engine above gives each token the advantage 1."""
    return synthetic([prompt], range(10, 10 + chosen)), synthetic([prompt], range(20, 20 + rejected))


def test_both_responses_of_a_pair_are_probed_together_and_pairs_are_spread_over_their_lengths() -> None:
    pairs = [pair(number, 1 + number, 2 + number) for number in range(20)]
    sequences = [sequence for two in pairs for sequence in two]
    for given in (sequences, sequences[::-1]):
        probed = probe_with(Engine(), given, given, count=8, pairs=pairs)
        assert (probed.responses, probed.tokens) == (8, sum(2 * number + 3 for number in (2, 7, 12, 17)))
        assert probed.rewards == RewardAccuracy(4, 0.0, -1.0)


def test_an_odd_number_of_responses_leaves_one_without_its_partner() -> None:
    pairs = [pair(number, 3, 1) for number in range(6)]
    sequences = [sequence for two in pairs for sequence in two]
    probed = probe_with(Engine(), sequences, sequences, count=5, pairs=pairs)
    assert (probed.responses, probed.rewards) == (5, RewardAccuracy(2, 1.0, 2.0))


def test_beside_sampled_responses_pairs_have_their_share() -> None:
    pairs = [pair(number, 3, 3) for number in range(8)]
    sampled = [synthetic([number], range(50, 53)) for number in range(8)]
    sequences = [*(sequence for two in pairs for sequence in two), *sampled]
    probed = probe_with(Engine(), sequences, sequences, count=12, pairs=pairs)
    assert probed.responses == 12
    assert probed.rewards == RewardAccuracy(4, 0.0, 0.0)


def test_a_response_of_several_pairs_is_probed_once_and_compared_in_each() -> None:
    chosen, rejected = pair(1, 4, 1)
    others = [synthetic([1], range(30, 30 + length)) for length in (3, 4, 6)]
    pairs = [(chosen, rejected), *((chosen, other) for other in others), (chosen, chosen)]
    sequences = [chosen, rejected, *others]
    probed = probe_with(Engine(), sequences, sequences, pairs=pairs)
    assert (probed.responses, probed.rewards) == (5, RewardAccuracy(4, 0.5, 0.5))


def test_a_pair_with_one_response_in_the_cache_is_not_compared() -> None:
    pairs = [pair(number, 3, 1) for number in range(4)]
    sequences = [sequence for two in pairs for sequence in two]
    probed = probe_with(Engine(), sequences, [sequences[0], *sequences[3:]], pairs=pairs)
    assert (probed.responses, probed.rewards) == (6, RewardAccuracy(2, 1.0, 2.0))
