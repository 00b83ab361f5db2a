"""The model card of a student: valid metadata, nothing private, true to the run, and the user's own is kept."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tests.commands import registered_as
from tests.pipeline.conftest import Filled
from transformers import AutoTokenizer

from adpa import distill
from adpa.parser import load
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.training.model_card import CITATION, card_facts, is_untouched, make_card, write_card
from adpa.pipeline.training.run_directory import read_record


@pytest.fixture(scope="module")
def student(filled: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of adpa on its own responses; before training it had a card with a license."""
    before = tmp_path_factory.mktemp("private-place") / "small"
    before.mkdir()
    for file in filled.models.student.iterdir():
        (before / file.name).write_bytes(file.read_bytes())
    card = "---\nlicense: apache-2.0\nbase_model: org/smallest\nlanguage: tlh\n---\n\n# Its own card\n"
    (before / "README.md").write_text(card)
    output = tmp_path_factory.mktemp("runs") / "student"
    options: dict[str, Any] = {"batch_size": 4, "max_steps": 2, "logging_steps": 1, "kl_weight": 0.25}
    distill("adpa", str(before), filled.cache, output, **options, set=["adam_beta2=0.95"])
    return output


def text_of(student: Path) -> str:
    return (student / "README.md").read_text()


def commands_of(text: str) -> dict[str, list[str]]:
    """The words of each command in the part on repeating the run."""
    block = text.partition("## Repeat it")[2].partition("```bash\n")[2].partition("```")[0]
    words = [shlex.split(command.replace("\\\n", " ")) for command in block.split("\n\n")]
    return {command[1]: command[2:] for command in words}


def test_the_metadata_is_what_the_hub_reads(student: Path) -> None:
    assert ModelCard.load(student / "README.md").data.to_dict() == {
        "base_model": "org/smallest",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["adpa", "distillation", "preference-alignment"],
    }


def test_the_card_of_the_student_before_training_is_not_copied(student: Path) -> None:
    assert "Its own card" not in text_of(student)
    assert text_of(student).startswith("---\nbase_model: org/smallest\n")


def test_the_loss_is_written_with_its_weights(student: Path) -> None:
    assert "loss = −log q(y_w) + 0.25 · KL(p‖q) on ŷ − 0.5 · Σ q·A on ŷ" in text_of(student)
    assert "y_w: the chosen responses; ŷ: the sampled responses" in text_of(student)
    assert "only where the teacher's probability of the token is at least 0.05" in text_of(student)


def test_teacher_reference_student_and_data_are_named_with_their_digests(student: Path, filled: Filled) -> None:
    text = text_of(student)
    for model in (filled.models.teacher, filled.models.reference, filled.models.student):
        assert open_checkpoint(str(model)).identity.digest[:16] in text
    assert f"| teacher | `{filled.models.teacher.name}` (digest" in text
    assert "| chosen responses | 8, from `prefs.jsonl`" in text
    assert "sampled by the student, temperature 1, top-p 1" in text


def test_no_path_of_this_machine_is_told(student: Path, filled: Filled) -> None:
    text = text_of(student)
    assert str(filled.cache.parent) not in text
    assert "private-place" not in text
    assert str(student.parent) not in text


def test_the_commands_repeat_the_run(student: Path, filled: Filled) -> None:
    commands = commands_of(text_of(student))
    assert commands["distill"] == shlex.split(
        "--objective adpa --student small --cache cache --output student --kl-weight 0.25 --max-steps 2 --batch-size 4 "
        "--logging-steps 1 --set adam_beta2=0.95"
    )
    assert commands["precompute"] == shlex.split(
        f"--teacher {filled.models.teacher.name} --reference {filled.models.reference.name} --data prefs.jsonl "
        "--cache cache --responses chosen,sampled --max-prompt-length 1024 --max-length 2048 --top-k 10 "
        "--dtype float32 --engine hf --student small --samples-per-prompt 2 --temperature 1.0 --max-new-tokens 6 "
        "--seed 0 --sampling-top-p 1.0"
    )


def test_the_command_line_takes_the_commands(student: Path) -> None:
    for name, words in commands_of(text_of(student)).items():
        command = load(registered_as(name))
        context = command.make_context(f"adpa {name}", words)
        assert str(context.params["cache"]) == "cache"


def test_the_results_are_those_of_the_record(student: Path) -> None:
    losses = read_record(student)["losses"]
    assert f"| loss | {losses[0]['loss']:.4g} | {losses[-1]['loss']:.4g} |" in text_of(student)
    assert f"| kl/sampled | {losses[0]['kl/sampled']:.4g} | {losses[-1]['kl/sampled']:.4g} |" in text_of(student)
    assert "2 steps of 4 examples (8 in all), learning rate 2e-05 (cosine)" in text_of(student)


def test_neither_the_model_nor_its_tokenizer_changes_by_the_card(student: Path) -> None:
    before = open_checkpoint(str(student)).identity
    (student / "evaluations.json").write_text("[]")
    (student / "curves.svg").write_text("<svg/>")
    write_card(student)
    assert "![curves of the run](curves.svg)" in text_of(student)
    assert open_checkpoint(str(student)).identity == before
    assert AutoTokenizer.from_pretrained(student).chat_template


@pytest.mark.parametrize("change", ["more", "less", "mark"])
def test_a_card_that_the_user_changed_stays(change: str, student: Path, tmp_path: Path) -> None:
    (tmp_path / "adpa.json").write_text((student / "adpa.json").read_text())
    write_card(tmp_path)
    whole = text_of(tmp_path)
    assert is_untouched(whole)
    own = {"more": whole + "mine\n", "less": whole.replace("## Use", "## Usage"), "mark": whole.rpartition("<!--")[0]}
    (tmp_path / "README.md").write_text(own[change])
    write_card(tmp_path)
    assert text_of(tmp_path) == own[change]


def test_a_card_as_adpa_wrote_it_is_written_again(student: Path, tmp_path: Path) -> None:
    record = read_record(student)
    for seconds in (60, 61):
        (tmp_path / "adpa.json").write_text(json.dumps(record | {"seconds": seconds}))
        write_card(tmp_path)
    assert " 61 seconds." in text_of(tmp_path)


def test_an_unfinished_run_has_no_card(student: Path, tmp_path: Path) -> None:
    record = read_record(student)
    del record["steps"]
    (tmp_path / "adpa.json").write_text(json.dumps(record))
    write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_names_of_the_hub_are_links_and_metadata(student: Path) -> None:
    record = read_record(student)
    record["student"] = {"name": "org/small@v2", "revision": "0123456789abcdef", "digest": "f" * 32}
    record["student_metadata"] = {"base_model": "org/small"}
    for one in record["response_sets"].values():
        one["record"] |= {"data": "org/prefs", "split": "train"}
    text = make_card("s", record, [], curves=False)
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["datasets"]) == ("org/small", ["org/prefs"])
    assert "license" not in data
    assert "[org/small](https://huggingface.co/org/small) (revision `0123456789ab`, digest `ffffffffffffffff`)" in text
    assert "--student org/small@0123456789abcdef" in text
    assert "--data org/prefs" in text
    assert "--split train" in text


@pytest.mark.parametrize("named", ["org/prefs", "org/prefs:en", "org/prefs@v2", "org/prefs:en@v2"])
def test_the_metadata_name_the_data_without_its_configuration_and_revision(named: str, student: Path) -> None:
    record = read_record(student)
    for one in record["response_sets"].values():
        one["record"] |= {"data": named}
    text = make_card("s", record, [], curves=False)
    assert ModelCard(text).data.to_dict()["datasets"] == ["org/prefs"]
    assert f"--data {named}" in text


def test_the_record_of_an_earlier_adpa_makes_a_shorter_card(student: Path) -> None:
    news = ("options", "scored", "response_sets", "student_metadata", "time")
    record = {name: value for name, value in read_record(student).items() if name not in news}
    text = make_card("s", record, [], curves=False)
    assert ModelCard(text).data.to_dict()["tags"] == ["adpa", "distillation", "preference-alignment"]
    assert "## Repeat it" not in text
    assert "## Training" in text


def test_losses_on_held_out_examples_are_told_if_there_are_any(student: Path) -> None:
    held_out = [{"step": 1, "eval_loss": 2.5}, {"step": 2, "eval_loss": 2.25}]
    text = make_card("s", read_record(student) | {"held_out": held_out}, [], curves=False)
    assert "| step | loss on held-out examples |\n| --- | --- |\n| 1 | 2.5 |\n| 2 | 2.25 |" in text
    assert "The student is that of step" not in text


def test_of_many_evaluations_three_are_told_and_which_student_was_kept(student: Path) -> None:
    held_out = [{"step": step, "eval_loss": abs(step - 700) / 100} for step in range(1, 2001)]
    record = read_record(student) | {"held_out": held_out, "steps": 2000, "kept_step": 700}
    text = make_card("s", record, [], curves=False)
    assert "Of 2,000 evaluations during training, the first, the best and the last:" in text
    assert "| --- | --- |\n| 1 | 6.99 |\n| 700 | 0 |\n| 2000 | 13 |\n\n" in text
    assert "The student is that of step 700, whose loss on held-out examples is the lowest." in text


@pytest.mark.parametrize("card", ["", "no metadata", "---\n[broken\n---\n", "---\nlicense: mit\n---\n"])
def test_a_license_is_named_only_if_the_student_says_it(
    card: str, student: Path, filled: Filled, tmp_path: Path
) -> None:
    from adpa.data.cache.selection import Need, select

    (tmp_path / "README.md").write_text(card)
    identity = open_checkpoint(str(filled.models.student)).identity
    selection = select(filled.cache, {"chosen": Need(False, False)}, identity.digest, None, (), {})
    facts = card_facts({}, selection, identity, tmp_path)
    assert facts["student_metadata"] == ({"license": "mit"} if "mit" in card else {})


def test_the_citation_is_that_of_the_repository() -> None:
    written = (Path(__file__).parents[3] / "CITATION.bib").read_text()
    assert f"```bibtex\n{written}```" == CITATION
