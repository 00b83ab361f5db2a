"""The curves of a run: which quantities they show, with which numbers, and a picture that any browser reads."""

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.pipeline.conftest import Filled

from adpa import distill
from adpa.pipeline.training import run
from adpa.pipeline.training.curves import MOST_POINTS, draw_curves, panels
from adpa.pipeline.training.run_directory import CURVES

BEFORE = {"step": 0, "student/entropy": 2.0, "student/mass_on_topk": 0.5, "student/implausible_mass": 0.25}


WATCHED = ["student's entropy", "student's probability mass"]


def log(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "loss": 3.0 / step, "learning_rate": 1e-3 / step} | values


def watched(step: int) -> dict[str, float]:
    return {name: value / step for name, value in BEFORE.items() if name != "step"}


def dckd_log(step: int) -> dict[str, float]:
    return log(step, **{"nll/chosen": 2.0 / step, "kl/chosen": 0.4 / step, "kl/rejected": 0.6 / step}, **watched(step))


DCKD = {"objective": "dckd", "examples": 8, "student_before": BEFORE, "losses": [dckd_log(1), dckd_log(2)]}
SFT = {"objective": "sft", "examples": 8, "student_before": {}, "losses": [log(1, **{"nll/chosen": 3.0})]}
ADPA = {
    "objective": "adpa",
    "student_before": BEFORE | {"student/advantage": -0.3},
    "losses": [
        log(10, **{"nll/chosen": 1.0, "advantage/sampled": 0.2, "student/advantage": -0.2}, **watched(10)),
        log(20, **{"nll/chosen": 0.9, "advantage/sampled": 0.1, "student/advantage": -0.1}, **watched(20)),
    ],
    "held_out": [{"step": 20, "eval_loss": 0.7, "eval_nll/chosen": 0.8, "eval_advantage/sampled": 0.3}],
}


@pytest.mark.parametrize(
    ("record", "titles"),
    [
        (SFT, ["loss", "learning rate"]),
        (
            DCKD,
            ["loss", "NLL of the responses", "KL from teacher to student", *WATCHED, "learning rate"],
        ),
        (
            ADPA,
            ["loss", "NLL of the responses", "advantage term", "student's mean advantage", *WATCHED, "learning rate"],
        ),
    ],
)
def test_a_run_has_a_panel_for_each_quantity_in_its_logs(record: dict[str, Any], titles: list[str]) -> None:
    assert [panel.title for panel in panels(record)] == titles


def lines(record: dict[str, Any], title: str) -> dict[str, tuple[list[float], list[float]]]:
    (panel,) = (panel for panel in panels(record) if panel.title == title)
    return {line.label: line.points for line in panel.lines}


def test_a_line_has_the_numbers_of_the_logs() -> None:
    assert lines(DCKD, "loss") == {"trained on": ([1, 2], [3.0, 1.5])}
    assert lines(DCKD, "KL from teacher to student") == {
        "chosen": ([1, 2], [0.4, 0.2]),
        "rejected": ([1, 2], [0.6, 0.3]),
    }
    assert lines(DCKD, "learning rate") == {"": ([1, 2], [1e-3, 5e-4])}


def test_what_was_measured_before_training_is_at_step_0() -> None:
    assert lines(DCKD, "student's entropy") == {"": ([0, 1, 2], [2.0, 2.0, 1.0])}
    assert lines(DCKD, "student's probability mass") == {
        "on the teacher's top K": ([0, 1, 2], [0.5, 0.5, 0.25]),
        "on unlikely tokens": ([0, 1, 2], [0.25, 0.25, 0.125]),
    }
    assert lines(ADPA, "student's mean advantage") == {"": ([0, 10, 20], [-0.3, -0.2, -0.1])}


def test_held_out_losses_are_dashed_lines_beside_the_others() -> None:
    assert lines(ADPA, "loss")["held out"] == ([20], [0.7])
    assert lines(ADPA, "NLL of the responses")["chosen, held out"] == ([20], [0.8])
    assert lines(ADPA, "advantage term")["sampled, held out"] == ([20], [0.3])
    assert {line.style for panel in panels(ADPA) for line in panel.lines if "held out" in line.label} == {"--"}


def test_a_term_that_is_only_held_out_has_a_line_too() -> None:
    """KL is measured on held-out examples wherever there are signals."""
    record = ADPA | {"held_out": [{"step": 20, "eval_loss": 0.7, "eval_kl/sampled": 0.5}]}
    assert lines(record, "KL from teacher to student") == {"sampled, held out": ([20], [0.5])}
    assert "sampled, held out" in texts(draw_curves(record))


def test_the_ticks_of_a_nearly_flat_line_differ() -> None:
    record = SFT | {"losses": [log(step, loss=4.15246 + step * 1e-8) for step in (1, 2, 3)]}
    ticks = [text for text in texts(draw_curves(record)) if text.startswith("4.15246")]
    assert len(ticks) == len(set(ticks)) > 1


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    ("record", "title"),
    [(SFT, "sft: 1 step on 8 examples"), (DCKD, "dckd: 2 steps on 8 examples"), (ADPA, "adpa: 20 steps")],
)
def test_the_picture_is_xml_with_its_words_as_text(record: dict[str, Any], title: str) -> None:
    """A run that was stopped has no count of examples; a run of one log has one point."""
    shown = texts(draw_curves(record))
    assert title in shown
    assert {panel.title for panel in panels(record)} <= set(shown)
    assert "nats per token" in shown
    assert "optimizer step" in shown


def test_equal_records_give_equal_bytes() -> None:
    svg = draw_curves(SFT)
    assert svg == draw_curves(json.loads(json.dumps(SFT)))
    assert not re.search(r"\d{4}-\d\d-\d\dT", svg)


def test_ten_thousand_logs_are_averaged_and_stay_small() -> None:
    record = DCKD | {"losses": [dckd_log(step) for step in range(1, 10_001)]}
    steps, losses = lines(record, "loss")["trained on"]
    assert len(steps) == MOST_POINTS
    assert sum(losses[:2]) / 2 < 3.0
    assert steps[0] == pytest.approx(34)  # the mean of the first 67
    assert len(draw_curves(record).encode()) < 100_000


@pytest.mark.parametrize("objective", ["sft", "adpa"])
def test_a_run_writes_its_curves_beside_its_record(objective: Any, filled: Filled, tmp_path: Path) -> None:
    distill(objective, str(filled.models.student), filled.cache, tmp_path, batch_size=4, max_steps=2)
    record = json.loads((tmp_path / "adpa.json").read_text())
    assert (tmp_path / CURVES).read_text() == draw_curves(record)


def test_matplotlib_is_imported_only_at_the_end_of_a_run() -> None:
    top = {name for node in ast.parse(inspect.getsource(run)).body for name in names(node)}
    assert top >= {"torch", "adpa.pipeline.training.trainer"}
    assert not {name for name in top if name.startswith("matplotlib") or name.endswith(".curves")}


def names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [str(node.module)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
