"""The cost formulae agree with counted FLOP and published parameter counts, and obey simple laws."""

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import cost_tables, costs
from benchmarks.cost_model import (
    STUDENTS,
    TEACHERS,
    Assumptions,
    GpuHours,
    Pairs,
    Responses,
    Shape,
    adpa_gpu_hours,
    dckd_gpu_hours,
    gpus_of_engine,
    needed_flops,
    sampling_seconds,
    scoring_seconds,
    scoring_work,
    slowest_rank_flops,
    step_seconds,
    training_seconds,
)
from tests.conftest import MakeModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from adpa.data.encoding import EncodedPair

ASSUMED = Assumptions()
DOCUMENTS = Path(__file__).resolve().parents[2] / "docs"


def random_pairs(seed: int = 0, count: int = 50) -> Pairs:
    generator = np.random.default_rng(seed)
    return Pairs(*generator.integers(1, 1000, (3, count)))


def equal_pairs(tokens: int = 100) -> Pairs:
    return Pairs(*np.full((3, 7), tokens))


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "eager",
    }
    return LlamaForCausalLM(LlamaConfig(**shape | settings))


def encoded(prompt: int, chosen: int, rejected: int) -> EncodedPair:
    generator = np.random.default_rng(0)
    return EncodedPair("", *(generator.integers(0, 300, size).astype(np.int32) for size in (prompt, chosen, rejected)))


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"head_dim": 16, "num_key_value_heads": 1}])
def test_the_formula_is_what_torch_counts_while_a_llama_scores_and_learns(settings: dict[str, Any]) -> None:
    model = tiny_llama(**settings)
    pairs = [encoded(5, 30, 7), encoded(40, 11, 60)]
    assert costs.count_flops(model, pairs) == costs.expected_flops(costs.shape_of(model), pairs)


def test_the_loss_head_makes_three_products_of_each_row() -> None:
    model, pairs = tiny_llama(), [encoded(5, 30, 7)]
    counted = costs.count_flops(model, pairs)
    assert counted.training - 3 * counted.decoder == 3 * 2 * 300 * 32 * (30 + 7)


def test_attention_is_counted_whole_and_grows_with_the_square_of_the_length() -> None:
    model = tiny_llama()
    shape = costs.shape_of(model)
    for tokens in (10, 20):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.base_model(input_ids=torch.ones(2, tokens, dtype=torch.long))
        assert counter.get_total_flops() == 2 * shape.decoder_flops(np.array([tokens]))[0]
        attention = shape.decoder_flops(np.array([tokens]))[0] - 2 * shape.matrices * tokens
        assert attention == 2 * 2 * 3 * 32 * tokens**2


def test_parameters_are_those_of_the_published_models() -> None:
    published = {"8B": 8_030_261_248, "70B": 70_553_706_496, "0.5B": 494_032_768, "1.5B": 1_543_714_304}
    assert {shape.name: shape.parameters for shape in (*TEACHERS, *STUDENTS)} == published


def test_parameters_are_those_of_models_that_transformers_makes() -> None:
    def numbers(model: torch.nn.Module) -> int:
        return sum(weight.numel() for weight in model.parameters())

    for tied in (False, True):
        model = tiny_llama(tie_word_embeddings=tied)
        assert costs.shape_of(model).parameters == numbers(model)
    shape = STUDENTS[0]
    with torch.device("meta"):
        qwen = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=shape.vocabulary,
                hidden_size=shape.width,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                tie_word_embeddings=True,
            )
        )
    assert shape.parameters == numbers(qwen)


def test_a_70b_teacher_takes_four_gpus_and_is_too_large_for_one_in_fp8() -> None:
    small, large = TEACHERS
    assert gpus_of_engine(small, ASSUMED) == 1
    assert gpus_of_engine(large, ASSUMED) == 4
    assert gpus_of_engine(large, ASSUMED, bytes_per_weight=1) == 2
    sets = random_pairs().responses()
    assert [scoring_seconds(large, sets, gpus, ASSUMED) is None for gpus in (1, 2, 3, 4, 8)] == [True] * 3 + [False] * 2


def test_scoring_on_one_gpu_is_the_flops_at_the_assumed_rates_and_the_start() -> None:
    shape = Shape("by hand", 1, 2, 3, 1, 1, 2, 10)  # P = 4 · 2 · 2 + 3 · 2 · 3
    assert (shape.matrices, shape.parameters) == (34, 34 + 3 * 2 + 2 * 10 * 2)
    assumed = replace(ASSUMED, pairs=6, peak_flops=100.0, scoring_share=0.5, head_share=0.05, load_rate=1.0)
    sets = [Responses(np.array([4]), np.array([6]))]
    decoder, head = 6 * (2 * 34 * 10 + 4 * 2 * 10**2) / 50, 6 * 2 * 10 * 2 * 6 / 5
    assert scoring_work(shape, sets, assumed) == pytest.approx(decoder + head)
    assert scoring_seconds(shape, sets, 1, assumed) == pytest.approx(60 + 2 * shape.parameters + decoder + head)


@pytest.mark.parametrize("pairs", [1, 500, 60_000])
def test_twice_the_gpus_are_never_slower_at_scoring_and_never_twice_as_fast(pairs: int) -> None:
    sets, assumed = random_pairs().responses(), replace(ASSUMED, pairs=pairs)
    for teacher in TEACHERS:
        times = [scoring_seconds(teacher, sets, gpus, assumed) for gpus in (4, 8, 16, 32, 64, 128)]
        for time, twice in pairwise(times):
            assert time is not None
            assert twice is not None
            assert time / 2 <= twice <= time * (1 + 1e-12)


def test_twice_the_gpus_are_never_slower_at_training_but_for_the_network() -> None:
    sets, assumed = random_pairs().responses(), replace(ASSUMED, node_rate=math.inf, network_rate=math.inf)
    for student in STUDENTS:
        times = [training_seconds(student, sets, gpus, assumed) for gpus in (1, 2, 4, 8, 16, 32, 64, 128)]
        for time, twice in pairwise(times):
            assert time is not None
            assert twice is not None
            assert twice <= time


def test_a_slow_network_makes_more_gpus_slower() -> None:
    sets, assumed = random_pairs().responses(), replace(ASSUMED, network_rate=1e9)
    one, many = (training_seconds(STUDENTS[0], sets, gpus, assumed) for gpus in (8, 64))
    assert one is not None
    assert many is not None
    assert many > one


def test_without_padding_a_rank_computes_its_share_and_with_it_more() -> None:
    student = STUDENTS[0]
    equal, random = equal_pairs().responses(), random_pairs().responses()
    exact = 3 * 128 * 2 * (student.decoder_flops(np.array([200]))[0] + student.head_flops(100))
    for gpus in (1, 8, 64):
        assert slowest_rank_flops(student, equal, gpus, ASSUMED) * gpus == pytest.approx(exact)
    wasted = [gpus * slowest_rank_flops(student, random, gpus, ASSUMED) for gpus in (1, 8, 64)]
    assert wasted == sorted(wasted)


def test_packing_leaves_no_padding_and_computes_a_shared_prompt_once() -> None:
    student, sets = STUDENTS[0], random_pairs().responses()
    padded, packed, shared = (
        slowest_rank_flops(student, sets, 1, replace(ASSUMED, packing=packing)) for packing in cost_tables.PACKINGS
    )
    assert packed == pytest.approx(needed_flops(student, sets, ASSUMED), rel=0.02)  # its examples are random
    assert shared < packed < padded
    whole, rows = np.array([200]), 2 * student.head_flops(100)
    once = student.decoder_flops(whole) + 2 * student.matrices * 100 + 4 * 24 * 14 * 64 * 100 * 200
    equal = slowest_rank_flops(student, equal_pairs().responses(), 8, replace(ASSUMED, packing="prompts"))
    assert equal == pytest.approx(3 * 16 * (once[0] + rows))


def test_a_batch_that_the_ranks_do_not_divide_is_refused() -> None:
    sets = random_pairs().responses()
    assert step_seconds(STUDENTS[0], sets, 64, replace(ASSUMED, batch=32)) is None
    assert training_seconds(STUDENTS[0], sets, 3, ASSUMED) is None


def test_one_gpu_has_no_gradients_to_send() -> None:
    sets = random_pairs().responses()
    one, two = (step_seconds(STUDENTS[0], sets, gpus, ASSUMED) for gpus in (1, 2))
    assert one is not None
    assert two is not None
    assert one.all_reduce == 0
    assert two.all_reduce == pytest.approx(4 * STUDENTS[0].parameters / ASSUMED.node_rate)


@pytest.mark.parametrize("cost", [dckd_gpu_hours, adpa_gpu_hours])
def test_a_cache_never_costs_more_than_a_live_teacher(cost: Callable[..., GpuHours]) -> None:
    pairs = random_pairs(count=20)
    for teacher in TEACHERS:
        for epochs in (1, 2, 5):
            for students in (1, 2, 16):
                hours = cost(teacher, STUDENTS[1], pairs, students, replace(ASSUMED, epochs=epochs))
                assert hours.shared <= hours.live * (1 + 1e-12)
    once = cost(TEACHERS[0], STUDENTS[1], pairs, 1, replace(ASSUMED, epochs=1))
    assert once.shared == pytest.approx(once.live)


def test_students_share_what_dckd_scores_and_nothing_of_adpa() -> None:
    pairs = random_pairs(count=20)
    one, two, three = (dckd_gpu_hours(TEACHERS[1], STUDENTS[0], pairs, count, ASSUMED) for count in (1, 2, 3))
    assert two.shared - one.shared == pytest.approx(three.shared - two.shared)
    assert two.shared < 1.5 * one.shared
    assert two.live == pytest.approx(2 * one.live)
    one, two = (adpa_gpu_hours(TEACHERS[1], STUDENTS[0], pairs, count, ASSUMED) for count in (1, 2))
    assert (two.shared, two.live) == pytest.approx((2 * one.shared, 2 * one.live))


def test_a_larger_student_samples_more_slowly() -> None:
    small, large = (sampling_seconds(student, random_pairs().sampled(), ASSUMED) for student in STUDENTS)
    assert small < large


def test_samples_end_at_512_tokens() -> None:
    assert equal_pairs(900).sampled().response.max() == 512


def test_figures_of_the_cache_are_those_of_its_own_benchmark() -> None:
    larger = (DOCUMENTS / "benchmarks/encoding.md").read_text().partition("128,256 ids")[2]
    for name, size in cost_tables.BYTES_PER_TOKEN.items():
        row = re.search(rf"│ {name} +│ ([\d.]+) +│ ([\d,]+)", larger)
        assert row is not None
        assert float(row[1]) == size
        assert int(row[2].replace(",", "")) == cost_tables.TOKENS_READ_PER_SECOND[name]


def test_the_document_states_the_assumptions_that_the_command_makes(capsys: pytest.CaptureFixture[str]) -> None:
    cost_tables.print_assumptions(ASSUMED)
    assert capsys.readouterr().out in (DOCUMENTS / "scaling.md").read_text()


def test_the_command_measures_and_prints_every_table(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_model(1)
    monkeypatch.setattr(costs, "save_smollm2", lambda folder: shutil.copytree(tiny, folder, dirs_exist_ok=True))
    monkeypatch.setattr(costs, "quiet", lambda: None)
    monkeypatch.setattr("sys.argv", ["costs", "--pairs", "1000", "--packing", "prompts"])
    costs.main()
    printed = capsys.readouterr().out
    assert "tokens of a pair (24 pairs" in printed
    assert printed.count("| 1.000000 |") == 3
    assert "Scoring 1,000 pairs" in printed
    assert "The cache of 1,000 pairs" in printed


def test_the_tables_say_where_a_teacher_does_not_fit_and_where_a_batch_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assumed = replace(ASSUMED, batch=32)
    for show in (cost_tables.print_scoring, cost_tables.print_training, cost_tables.print_totals):
        show(random_pairs(), assumed)
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [row[3] for row in rows if row[0] == "70B" and len(row) == 6] == ["does not fit"] * 3
    assert [row[3:] for row in rows if row[:3] == ["0.5B", "64", "0.5"]] == [["refused"] * 8]
    assert next(row[4] for row in rows if row[:2] == ["8B", "1.5B"]) == "refused"
    assert next(row[2] for row in rows if row[:2] == ["70B", "1.5B"]) == "does not fit"
