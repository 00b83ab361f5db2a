"""Study files: valid ones, and the errors of invalid ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from adpa.errors import OptionError
from adpa.lab.seed_list import check_seeds
from adpa.lab.study import OWN_STUDY, Study, read_study
from adpa.yaml_options import read_options

SMALL = """
seeds: [3, 4]
tuning_seeds: [1]
options: {num_train_epochs: 2, learning_rate: 1.0e-3, logging_steps: 5}
methods:
  SFT: {objective: sft, trials: [{learning_rate: 1.0e-3}, {learning_rate: 3.0e-3}]}
  DPO: {objective: dpo, beta: 0.1}
  DCKD: {objective: dckd, control: SFT}
  ADPA+: {objective: adpa, after: DCKD, plausibility: 0, on: rejected}
"""


def study(text: str, tmp_path: Path) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return read_study(path)


def test_options_of_the_study_are_those_of_every_method_that_has_them(tmp_path: Path) -> None:
    methods = study(SMALL, tmp_path).methods
    assert methods["DPO"].options == {"num_train_epochs": 2, "learning_rate": 1e-3, "beta": 0.1}
    assert methods["DCKD"].options == {"num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 5}
    assert methods["SFT"].trials == ({"learning_rate": 1e-3}, {"learning_rate": 3e-3})


def test_the_word_on_is_an_option_although_yaml_reads_it_as_true(tmp_path: Path) -> None:
    assert study(SMALL, tmp_path).methods["ADPA+"].options["on"] == "rejected"


def test_a_number_is_one_although_yaml_reads_it_as_text(tmp_path: Path) -> None:
    text = SMALL.replace("learning_rate: 1.0e-3, logging", "learning_rate: 1e-3, logging")
    assert study(text, tmp_path).methods["DCKD"].options["learning_rate"] == 1e-3


def test_a_sweep_is_a_variant_for_every_combination(tmp_path: Path) -> None:
    sweep = "sweeps: [{name: γ, objective: adpa, advantage_weight: [1, 2], plausibility: [0, 0.05]}]"
    variants = study(SMALL + sweep, tmp_path).variants
    assert list(variants) == [
        "γ, advantage_weight=1, plausibility=0",
        "γ, advantage_weight=1, plausibility=0.05",
        "γ, advantage_weight=2, plausibility=0",
        "γ, advantage_weight=2, plausibility=0.05",
    ]
    last = list(variants.values())[-1]
    assert last.swept == {"advantage_weight": 2, "plausibility": 0.05}
    assert last.options == {"num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 5, **last.swept}


def test_the_laboratory_is_an_option(tmp_path: Path) -> None:
    text = "laboratory: {candidates: 8, noise: 0.5, operations: [copy], pairs: 50, student: {width: 16}}"
    plan = study(SMALL + text, tmp_path).plan
    assert (plan.environment.candidates, plan.environment.noise, plan.environment.operations) == (8, 0.5, ("copy",))
    assert (plan.pairs, plan.student.width, plan.student.layers) == (50, 16, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds: [5, 5]", "seeds: seed 5 occurs twice; name every seed once"),
        ("seeds: 5", "seeds 5; expected a list"),
        ("seeds: [-1]", r"seeds: \[-1\]; expected a list of numbers of at least 0"),
        ("seeds: []", r"seeds: \[\]; expected at least one"),
        ("tuning_seeds: [4]", "seed 4 is both tuned on and reported"),
        ("tuning_seeds: []", "'SFT' has trials; name tuning_seeds"),
        ("prompts: 0", "prompts 0; expected at least 2"),
        ("colour: blue", "'colour' is unknown; expected some of"),
        ("methods: [SFT]", r"methods: \['SFT'\]; expected a mapping"),
        ("methods: {X: {objective: ppo}}", "methods: 'X': objective 'ppo'; expected one of sft, kd, dckd, adpa, dpo"),
        ("methods: {X: {}}", "methods: 'X': objective 'None'; expected one of"),
        ("methods: {X: {objective: sft, gamma: 1}}", "methods: 'X': 'gamma' is unknown; expected some of"),
        ("methods: {X: {objective: dpo, kl_weight: 1}}", "'kl_weight' is unknown"),
        ("methods: {X: {objective: sft, trials: [{gamma: 1}]}}", "'X': a trial: 'gamma' is unknown"),
        ("methods: {X: {objective: sft, trials: 3}}", "'X': trials 3; expected a list"),
        ("methods: {X: {objective: adpa, advantages: doubled}}", "advantages 'doubled'; expected one of log ratio, "),
        (
            "methods: {X: {objective: adpa, after: Y}}",
            "'X' comes after 'Y'; expected a method that begins",
        ),
        ("methods: {X: {objective: sft, control: Y}}", "'X' has the control 'Y', which is no method"),
        ("variants: {SFT: {objective: sft}}", "the name 'SFT'; expected letters and digits"),
        ("variants: {teacher: {objective: sft}}", "the name 'teacher'; expected letters and digits"),
        ("variants: {A B: {objective: sft}, A-B: {objective: sft}}", "the name 'A B'; expected"),
        ("variants: {'..': {objective: sft}}", "the name '..'; expected"),
        ("methods: {}", "no methods; expected at least one"),
        (
            "methods: {X: {objective: kd, trials: [{kl_weight: 1}]}, Y: {objective: sft, trials: [{}, {}]}}",
            "different n",
        ),
        ("methods: {X: {objective: sft, kl_weight: 1}}", "'X': --kl-weight with sft, which has no KL term"),
        ("methods: {X: {objective: adpa, trials: [{plausibility: 2}]}}", "'X': --plausibility 2; expected"),
        ("methods: {X: {objective: adpa, on: bogus}}", "'X': --on 'bogus'; expected one of"),
        ("methods: {X: {objective: kd, prior: true}}", "'X': advantages or prior with kd"),
        ("methods: {X: {objective: sft, after: [a]}}", r"'X': after \['a'\]; expected a name"),
        ("methods: {X: {objective: sft, batch_size: 1.5}}", "batch_size 1.5; expected a whole number"),
        ("sweeps: 3", "sweeps 3; expected a list"),
        ("laboratory: {candidates: 1}", "candidates 1; expected at least 2"),
        ("laboratory: {flipped: 7}", "flipped 7; expected between 0 and 1"),
        ("laboratory: {operations: [[copy]]}", r"operation \['copy'\]; expected some of"),
        ("laboratory: {teacher: {width: 5}}", "teacher: 2 layers of width 5; expected 8, 16"),
        ("variants: {X: {objective: sft, trials: [{}]}}", "the variant 'X' has trials"),
        ("laboratory: {size: 3}", "laboratory: 'size' is unknown"),
        ("laboratory: {operations: [sort]}", "laboratory: operation 'sort'; expected some of ascending"),
        ("laboratory: {pairs: many}", "laboratory: pairs 'many'; expected a number of at least 0"),
        ("laboratory: {operations: []}", "laboratory: no operations; expected some of"),
        ("methods: {X: {objective: sft, learning_rate: fast}}", "'X': learning_rate 'fast'; expected a number"),
        ("methods: {X: {objective: adpa, top_k: [3]}}", r"'X': top_k \[3\]; expected a number"),
        ("laboratory: {student: {depth: 3}}", "laboratory: student: 'depth' is unknown"),
        ("sweeps: [{objective: adpa, gamma: [1, 2]}]", "sweeps: 'gamma' is unknown"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(change: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    content: dict[str, Any] = {}
    for part in (SMALL, change):
        path.write_text(part)
        content |= read_options("--study", path)
    with pytest.raises(OptionError, match=message):
        study(yaml.safe_dump(content, allow_unicode=True), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "line 1: expected the node content"),
        ("", "expected a mapping"),
        ("{}", "lacks methods"),
        ("seeds: [1]\nseeds: [2]\n", "'seeds' is there twice"),
    ],
)
def test_what_is_no_study_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        study(text, tmp_path)


def test_a_study_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--study nowhere.yaml: .*No such file"):
        read_study(Path("nowhere.yaml"))


def test_the_settings_of_a_study_leave_out_what_may_grow(tmp_path: Path) -> None:
    one, other = study(SMALL, tmp_path), study(SMALL.replace("[3, 4]", "[3, 4, 5]"), tmp_path)
    assert one.settings() == other.settings()
    assert one.settings() != study(SMALL + "prompts: 7", tmp_path).settings()


def test_seeds_are_numbers_of_their_own() -> None:
    assert check_seeds([0, 7], "--seed") == (0, 7)
    with pytest.raises(OptionError, match="--seed: seed 7 occurs twice"):
        check_seeds([7, 1, 7], "--seed")


def test_the_own_study_gives_every_method_as_many_trials_and_reports_eight_other_seeds() -> None:
    own = read_study(OWN_STUDY)
    assert {len(method.trials) for method in own.methods.values()} == {4}
    assert len(own.seeds) >= 8
    assert not set(own.seeds) & set(own.tuning_seeds)
    after = {name for name, method in own.methods.items() if method.after}
    assert after == {"ADPA+", "ADPA+ as published"}
    # A control trains for as many epochs in total, its predecessor's included.
    for name, method in own.methods.items():
        if method.control:
            epochs = method.options["num_train_epochs"] * (2 if name in after else 1)
            assert own.methods[method.control].options["num_train_epochs"] == epochs, name
