from pathlib import Path

import pytest

from adpa.errors import OptionError
from adpa.lab.demo import BASELINE, make_room, summarize
from adpa.lab.evaluate import Evaluation


def test_the_summary_compares_every_model_with_the_sft_student() -> None:
    results = summarize(
        {
            BASELINE: Evaluation(sampled=(0.2, 0.4), greedy=(0.5, 0.5)),
            "DCKD": Evaluation(sampled=(0.2, 0.6), greedy=(0.9, 1.0)),
        }
    )
    assert results[BASELINE] == {
        "sampled": {"reward": pytest.approx(0.3), "win_rate": 0.5},
        "greedy": {"reward": pytest.approx(0.5), "win_rate": 0.5},
    }
    assert results["DCKD"] == {
        "sampled": {"reward": pytest.approx(0.4), "win_rate": 0.75},
        "greedy": {"reward": pytest.approx(0.95), "win_rate": 1.0},
    }


def test_a_former_demo_is_replaced(tmp_path: Path) -> None:
    former = tmp_path / "demo-run" / "lab" / "teacher"
    former.mkdir(parents=True)
    make_room(tmp_path / "demo-run")
    assert not former.exists()


def test_a_directory_that_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.touch()
    with pytest.raises(OptionError, match="not a former demo"):
        make_room(tmp_path)
    assert precious.exists()
