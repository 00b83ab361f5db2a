"""Every report fits a terminal of 80 columns, and narrower ones, with all its values whole."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from adpa.data.bootstrap import Interval
from adpa.data.cache.compact import RoundingErrors
from adpa.data.cache.responses import ResponseSetInfo, Sampling
from adpa.data.cache.set_records import SetRecord
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.data.fidelity import Fidelity
from adpa.data.inspection import Alternative, InspectedResponse, InspectedToken
from adpa.data.reward_accuracy import RewardAccuracy, SetRewards
from adpa.data.summary import QUANTILES, AdvantageGroup, Distribution, SignalSummary
from adpa.lab.report import MethodResult, StudyReport, show_study
from adpa.pipeline.cache.export import ExportReport
from adpa.pipeline.cache.gc import Garbage, GarbageReport
from adpa.pipeline.cache.ls import (
    CacheListing,
    ListedFiles,
    ListedSamples,
    ListedScoring,
    ListedSet,
    ListedTokenizer,
)
from adpa.pipeline.cache.merge import MergeReport, Taken
from adpa.pipeline.cache.pack import PackedFolder, PackReport
from adpa.pipeline.cache.verify import Fault, VerifyReport
from adpa.pipeline.inspect import InspectReport
from adpa.pipeline.inspected_runs import InspectedRun
from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.scoring.probe import ProbeReport
from adpa.pipeline.terminal.cache import show_garbage, show_listing, show_packing, show_verification
from adpa.pipeline.terminal.inspection import show_inspection
from adpa.pipeline.terminal.precompute import show_precompute
from adpa.pipeline.terminal.report import show_report

TEACHER, REFERENCE = "meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B-Instruct-SFT@3f2c1d"
CACHE = "s3://our-team/experiments/2026/llama-3.1-70b/ultrafeedback-binarized/teacher-signals"
DATA = "/home/somebody/projects/alignment/data/ultrafeedback_binarized_train_prefs_cleaned.parquet"
CHOSEN, REJECTED = "chosen-f80605c0c62749ed", "rejected-4fa42afa0e43fbe8"
SCORING = "c45eff6cd9eea5d8"
ROWS, TOKENS, BYTES = 4_812_345, 1_234_567_890, 412_345_678_901


def distribution(low: float, high: float) -> Distribution:
    return Distribution((low + high) / 2, {name: low + share * (high - low) for name, share in QUANTILES.items()})


SUMMARY = SignalSummary(
    response_set=REJECTED,
    made=f"{ROWS:,} responses of the student cbb492e5, temperature 0.7, top-p 0.95, seed 12345",
    scoring=SCORING,
    teacher=TEACHER,
    reference=REFERENCE,
    responses=ROWS,
    tokens=TOKENS,
    top_k=1000,
    in_top_k=0.98765,
    captured_mass=distribution(0.5, 1),
    tail=distribution(0, 0.5),
    token_logprob=distribution(-118.434, 0),
    token_advantage=distribution(-22.345, 21.234),
    topk_advantage=distribution(-42.345, 41.234),
    plausible=AdvantageGroup(BYTES, BYTES - 1, 1.2345, 23.456),
    implausible=AdvantageGroup(BYTES + 1, BYTES - 2, 2.3456, 34.567),
)
LONG = "·".join(["internationalization"] * 3).replace("·", "")  # a token of 60 characters


def token(label: str, advantage: float) -> InspectedToken:
    others = [Alternative(place, f"{label}{place}", 0.987 / (place + 1), -advantage - place) for place in range(5)]
    return InspectedToken(11, label, 1, label, False, -12.345, advantage, others)


INSPECTION = InspectReport(
    summaries=[SUMMARY],
    data=f"{DATA} (2026-11-28 14:02 UTC)",
    left_out=[f"{CHOSEN}: {ROWS:,} of its responses have no signals"],
    responses=[
        InspectedResponse(
            "5c7e0c1d2f3a4b5c",
            "Say it.",
            [token(label, place - 2.5) for place, label in enumerate(["it", LONG, "天気", " no", "-" * 40, "x"])],
        )
    ],
    html="/home/somebody/projects/alignment/pages/of/the/teacher/and/the/reference/page-of-chosen.html",
    rewards=[SetRewards(ROWS, 0.987, -12345.67, CHOSEN, REJECTED, SCORING)],
    runs=[InspectedRun("runs/dckd", "dckd", TEACHER, {}, {}, ROWS, 150_000, 12345.678, 3.25)],
)
PROBE = ProbeReport(
    responses=12_345,
    tokens=8_765_432,
    stand_ins=False,
    own_top_k=1000,
    top_k=10_000,
    tail=0.0012345,
    by_top_k=[
        Fidelity(top_k, 0.98765, 0.87654, 0.01235, 2.5e-05, 0.00012, 0.0625, 10 * BYTES) for top_k in (50, 1000, 10000)
    ],
    data_responses=ROWS,
    data_tokens=TOKENS,
    input_tokens=3 * TOKENS,
    kl_against="student",
    teacher_hours=1234.5,
    reference_hours=1234.5,
    missing_hours=2345.6,
    rewards=RewardAccuracy(ROWS, 0.75, 12345.67),
)
PRECOMPUTED = PrecomputeReport(
    rows=ROWS,
    used=ROWS - 12_345,
    duplicates=1_234,
    identical=2_345,
    contradicting=3_456,
    scored=2 * ROWS,
    reused=ROWS + 1,
    resumed=4_567,
    resumed_halves=5_678,
    resumed_samples=6_789,
    sampled=ROWS + 2,
    awaited=7_891,
    tokens=TOKENS,
    bytes=BYTES,
    truncated_prompts=8_912,
    prompts=ROWS,
    truncated_responses=9_123,
    thinking_left_out=10_234,
    dropped=12_345,
    dropped_by_reason={"the response has a control token of the chat template": 12_345},
    engine="vllm 0.12.1, tensor parallel 8, fp8, head float32",
    engine_reason="vLLM's own head, because the head of the teacher is quantized and --head-dtype is auto",
    workers=64,
    part="127/1024",
    scoring=SCORING,
    responses={"chosen": CHOSEN[-16:], "rejected": REJECTED[-16:]},
    seconds=123_456.7,
    dry_run=False,
)
INFO = ResponseSetInfo(
    name="sampled",
    tokenizer="aee217dbe3c8cf7f04e5c5260d3d95b5",
    vocabulary="651e302463ef41be8382719505b9d0af",
    chat_template="651e302463ef41be8382719505b9d0af",
    turn_end=128_009,
    max_prompt_length=4_096,
    max_length=8_192,
    truncated_prompts=12_345,
    truncated_responses=23_456,
    dropped=34_567,
    sampling=Sampling("cbb492e5" * 4, 128_009, 0.7, 0.95, 2_048, 8, 1, "bfloat16", "vllm 0.12.1"),
)
LISTING = CacheListing(
    cache=CACHE,
    sets=[
        ListedSet(
            f"sampled-{SCORING}",
            ROWS,
            TOKENS,
            3 * TOKENS,
            BYTES,
            INFO,
            SetRecord(DATA, "train[:1000]", "2026-11-28T14:02:00.000000+00:00"),
            {SCORING: ROWS - 1},
        )
    ],
    scorings=[
        ListedScoring(
            SCORING,
            Scoring(
                ModelIdentity(TEACHER, None, "a"), ModelIdentity(REFERENCE, None, "b"), "c", 1000, "bfloat16", "vllm"
            ),
            2 * ROWS,
            12_346,
            23_457,
            TOKENS,
            12_348,
            BYTES,
            4_321.5,
            34_569,
            BYTES,
            RoundingErrors(1.2e-5, 3.4e-4, 5.6e-3),
        )
    ],
    samples=[ListedSamples("7393a70abcf21695", [f"sampled-{SCORING}"], ROWS + 5, 3, BYTES + 5)],
    tokenizers=[ListedTokenizer("aee217dbe3c8cf7f04e5c5260d3d95b5", [CHOSEN, REJECTED], 17_345_678)],
    undescribed=ListedFiles(1_235, BYTES + 6),
    unfinished=ListedFiles(1_236, BYTES + 7),
    damaged=ListedFiles(1_237, BYTES + 8),
    unknown=["notes/on/" + "what-we-tried-" * 8 + ".txt"],
    unreadable=["responses/chosen.arrow: damaged"],
    total=ListedFiles(123_456, 3 * BYTES),
)
FAULTS = VerifyReport(
    CACHE,
    123_456,
    BYTES,
    ROWS,
    [Fault(f"scorings/{SCORING}/signals-{'9b' * 16}.arrow", "a row has another key than its sequence", 12_345)],
    [f"damaged/scorings/{SCORING}/signals-{'9b' * 16}.arrow"],
    ["notes.txt"],
    1_234,
    2_345,
)
GARBAGE = GarbageReport(
    CACHE,
    [Garbage(f"scorings/{SCORING}/signals-{'9b' * 16}.arrow", "signals", "no set needs them", ROWS, 12_345, BYTES)],
    BYTES + 1,
    [f"responses/.chosen-{'0' * 32}.arrow.{'1' * 32}"],
    [f"scorings/{SCORING}/signals-{'8a' * 16}.arrow"],
    False,
)
PACKED = PackReport(CACHE, [PackedFolder(f"scorings/{SCORING}", 123_456, 1_610, BYTES + 1, BYTES, 12_345)], 12)
MERGED = MergeReport(CACHE, CACHE + "-2", Taken(1_234, BYTES), Taken(2_345, BYTES + 1), Taken(3_456, BYTES + 2))
MERGED = replace(MERGED, left_out=Taken(4_567, BYTES + 3), refused=[f"responses/{CHOSEN}-{'9b' * 16}.arrow: damaged"])
EXPORTED = ExportReport(DATA, CHOSEN, f"{DATA} (2026-11-28 14:02 UTC)", SCORING, ROWS, TOKENS, BYTES, [])
WIDE = Interval(-12.345, -13.456, -11.234)
METHOD = MethodResult("ADPA+ without reference", {}, {}, WIDE, WIDE, WIDE, WIDE, "SFT", WIDE, [11, 12], 0.123)
STUDY = StudyReport(DATA, [*range(11, 19)], 5_000, [METHOD, METHOD], [METHOD], ["0.1.0"], 12_345.6)

REPORTS: dict[str, tuple[Callable[[Any], RenderableType], Any]] = {
    "precompute": (show_precompute, PRECOMPUTED),
    "precompute --probe": (show_precompute, replace(PRECOMPUTED, probe=PROBE, dry_run=True)),
    "inspect": (show_inspection, INSPECTION),
    "cache ls": (show_listing, LISTING),
    "cache verify": (show_verification, FAULTS),
    "cache gc": (show_garbage, GARBAGE),
    "cache pack": (show_packing, PACKED),
    "cache merge": (lambda report: show_report("cache merge", report), MERGED),
    "cache export": (lambda report: show_report("cache export", report), EXPORTED),
    "lab": (show_study, STUDY),
}
# What a report has for JSON alone, or says in other words.
UNSAID = {
    "precompute": {"dropped", "prompts"},
    "precompute --probe": {"dropped", "prompts"},
    "inspect": {"id", "part", "responses"},
    "cache ls": {"tokenizer", "vocabulary", "chat_template", "turn_end", "max_prompt_length", "max_length", "cache"},
    "cache gc": {"kept"},
    "lab": {"seeds", "seconds"},
}
UNSAID["cache ls"] |= {"student", "pending_bytes", "data_tokens"}


def printed(name: str, width: int) -> str:
    show, report = REPORTS[name]
    console = Console(width=width)
    with console.capture() as capture:
        console.print(show(report))
    return capture.get()


def numbers(value: Any, unsaid: set[str]) -> Iterator[str]:
    """The large numbers of a report, as people read them."""
    if isinstance(value, dict):
        for name, one in value.items():
            if name not in unsaid:
                yield from numbers(one, unsaid)
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one, unsaid)
    elif isinstance(value, int) and value >= 1000:
        yield f"{value:,}"


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("name", REPORTS)
def test_no_line_is_longer_than_the_terminal_and_nothing_is_cut(name: str, width: int) -> None:
    text = printed(name, width)
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("name", REPORTS)
def test_every_large_number_is_there_in_one_piece(name: str, width: int) -> None:
    text = printed(name, width)
    wanted = set(numbers(asdict(REPORTS[name][1]), UNSAID.get(name, set())))
    wanted -= {f"{kept.top_k:,}" for kept in PROBE.by_top_k}  # a heading, without commas
    assert {number for number in wanted if number not in text} == set()


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("precompute", [SCORING, PRECOMPUTED.engine, "127/1024", "123,457", "64"]),
        ("inspect", [TEACHER, REFERENCE, DATA, REJECTED, SCORING, "-12,345.67", "98.77%"]),
        ("inspect", ["-117.250", "-41.509", "40.398", "23.456", "34.567", "-2.50", "+2.50", "0.99"]),
        ("cache ls", [TEACHER, REFERENCE, DATA, "train[:1000]", SCORING, "4,321.5", LISTING.unknown[0], CHOSEN]),
        ("cache verify", [FAULTS.faults[0].place, FAULTS.faults[0].problem, FAULTS.set_aside[0]]),
        ("cache gc", [GARBAGE.garbage[0].place, GARBAGE.young[0], GARBAGE.repeated[0]]),
        ("cache pack", [PACKED.packed[0].folder]),
        ("cache merge", [MERGED.cache, MERGED.other, MERGED.refused[0]]),
        ("cache export", [DATA, CHOSEN, SCORING]),
        ("lab", [DATA]),
    ],
)
def test_names_and_measures_are_whole_where_they_are_folded_too(name: str, values: list[str], width: int) -> None:
    text = squeezed(printed(name, width))
    assert [value for value in values if squeezed(value) not in text] == []


def test_the_table_of_a_study_and_of_a_probe_keep_names_and_numbers_on_one_line() -> None:
    assert "ADPA+ without reference" in printed("lab", 80)
    assert "[-13.456, -11.234] [-13.456, -11.234] [-13.456, -11.234]" in printed("lab", 80)
    line = "1000  0.9877 0.8765 0.0123 2.5e-05 0.00012  6.25%  3,340 4,123,456,789,010"
    assert line in printed("precompute --probe", 80)


def squeezed(text: str) -> str:
    return "".join(text.replace("│", "").split())
