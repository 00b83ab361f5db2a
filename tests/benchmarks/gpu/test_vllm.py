"""The measures of vLLM in ``benchmarks.gpu.run``, with a real vLLM on the CPU."""

from pathlib import Path

import pytest
from benchmarks.gpu.part import Setting
from benchmarks.gpu.sampling import sampling
from benchmarks.gpu.scoring import scoring
from benchmarks.gpu.vllm import sampling_with_vllm, scoring_with_vllm, vllm_prefill

pytestmark = pytest.mark.vllm


@pytest.fixture
def dry(tmp_path: Path) -> Setting:
    return Setting("cpu", tmp_path, None, float("inf"))


def test_prefill_scoring_and_sampling_have_a_speed(dry: Setting) -> None:
    figures = [
        figure
        for measured in (
            vllm_prefill(dry),
            scoring_with_vllm(dry, is_async=True),
            scoring_with_vllm(dry, is_async=False),
            sampling_with_vllm(dry),
        )
        for figure in measured
    ]
    assert [figure.name for figure in figures] == [
        "1.5B: vLLM, bare prefill",
        "1.5B: vLLM, decoder and head, async scheduling on",
        "1.5B: vLLM, decoder and head, async scheduling off",
        "vLLM",
    ]
    assert all(figure.value > 0 and figure.unit == "tokens/s" for figure in figures)


def test_a_dry_run_starts_no_engine(dry: Setting) -> None:
    for measures in (scoring(dry), sampling(dry)):
        of_vllm = [measure for measure in measures if "vLLM" in measure.name]
        assert of_vllm
        assert {measure.obstacle for measure in of_vllm} == {"a dry run starts no engine"}
