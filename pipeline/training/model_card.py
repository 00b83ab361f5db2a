"""The model card of a student: README.md in its directory, made from adpa.json and evaluations.json alone.

Imports no torch. Of a path on this machine the card shows the last part only, because cards are published.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from adpa.data.cache.files import write_file
from adpa.data.cache.selection import Selection
from adpa.data.cache.signals import ModelIdentity
from adpa.data.hub import HUB_NAME
from adpa.data.public_names import last_part, public_name
from adpa.pipeline.training.card_commands import distill_command, precompute_command
from adpa.pipeline.training.evaluation_numbers import comparison, measures
from adpa.pipeline.training.run_directory import CARD, CURVES, read_evaluations, read_record
from adpa.pipeline.training.serving import transformers_lines, vllm_lines

LICENSE = ("license", "license_name", "license_link")
MARK = "<!-- adpa wrote this card, and writes it again after an evaluation unless it was changed: {} -->\n"
MOST_EVALUATIONS = 10  # during training: of more, the card shows the first, the best and the last
SYMBOLS = {"chosen": "y_w", "rejected": "y_l", "sampled": "ŷ"}
MEANINGS = {
    "nll": "−log q: the negative log-probability that the student q gives to the response's tokens.",
    "kl": "KL(p‖q): the divergence of the student q from the teacher p at every token of the response.",
    "advantage": "Σ q·A: the expected advantage of the student's next token. A = log p − log r compares the teacher p "
    "with the reference r, which is the teacher before preference training.",
}
CITATION = """```bibtex
@inproceedings{gao2025advantage,
  title     = {Advantage-Guided Distillation for Preference Alignment in Small Language Models},
  author    = {Gao, Shiping and Wan, Fanqi and Guo, Jiajian and Quan, Xiaojun and Wang, Qifan},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2502.17927}
}
```"""


def card_facts(
    changed: Mapping[str, Any], selection: Selection, student: ModelIdentity, directory: Path
) -> dict[str, Any]:
    """What adpa.json has for the card beside what it has anyway: options, teacher and reference, data, the time.

    Args:
        changed: the options of ``distill`` that differ from the defaults.
        selection: the response sets and the scoring of the run.
        student: the student before training.
        directory: its directory.
    """
    sets = {
        name: {"rows": len(one), **asdict(one.info), "record": asdict(one.record) if one.record else None}
        for name, one in selection.sets.items()
    }
    facts = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": changed,
        "scored": asdict(selection.scoring) if selection.scoring else None,
        "response_sets": sets,
        "student_metadata": _student_metadata(student, directory),
    }
    return json.loads(json.dumps(facts, default=str))


def _student_metadata(student: ModelIdentity, directory: Path) -> dict[str, Any]:
    """The license that the student's own card or configuration names, and the model of the Hub that it comes from."""
    own: dict[str, Any] = {}
    for file in (directory / "config.json", directory / CARD):
        try:
            text = file.read_text()
            own |= json.loads(text) if file.suffix == ".json" else ModelCard(text).data.to_dict()
        except (OSError, ValueError, yaml.YAMLError):  # it has none, or one that says nothing
            continue
    base = student.name.partition("@")[0] if student.revision else own.get("base_model")
    return {name: own[name] for name in LICENSE if own.get(name)} | ({"base_model": base} if base else {})


def write_card(output: Path) -> None:
    """Writes the card of a finished run, unless there is one that is not adpa's, or that was changed.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: adpa.json or evaluations.json is damaged.
    """
    card, record = output / CARD, read_record(output)
    if "steps" not in record or (card.exists() and not is_untouched(card.read_text(errors="replace"))):
        return
    text = make_card(output.resolve().name, record, read_evaluations(output), (output / CURVES).exists())
    write_file(card, (text + MARK.format(_digest(text))).encode())


def is_untouched(text: str) -> bool:
    """Whether a card is as adpa wrote it."""
    mark = re.search(re.escape(MARK).replace(r"\{\}", "([0-9a-f]{16})") + r"\Z", text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make_card(name: str, record: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], curves: bool) -> str:
    """The card of a student, without the mark that adpa knows it by.

    Args:
        name: the student's name.
        record: adpa.json of a finished run; that of an earlier adpa says less.
        evaluations: the entries of evaluations.json.
        curves: whether the directory has a picture of the run's curves.
    """
    parts = [
        f"---\n{_metadata(record).to_yaml()}\n---",
        f"# {name}",
        f"This is {_model(record['student'])} after training with adpa by the objective **{record['objective']}**.",
        *_method(record),
        *_data(record),
        *_repeat(record),
        *_results(record, curves),
        *_evaluations(evaluations),
        *_use(name),
        "## Citation",
        CITATION,
    ]
    return "\n\n".join(parts) + "\n\n"


def _metadata(record: Mapping[str, Any]) -> ModelCardData:
    sets = record.get("response_sets", {}).values()
    sources = [one["record"]["data"] for one in sets if one["record"]]
    names = {re.split("[:@]", source)[0] for source in sources if not os.path.isabs(source)}
    of_student = record.get("student_metadata", {})
    bases = of_student.get("base_model", [])
    bases = [base for base in ([bases] if isinstance(bases, str) else bases) if _is_hub_name(base)]
    distilled = ["distillation", "preference-alignment"] if record["scoring"] else []
    return ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        datasets=sorted(filter(_is_hub_name, names)) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["adpa", record["objective"], *distilled, *(["lora"] if record["lora"] else [])],
        **{name: of_student[name] for name in LICENSE if name in of_student},
    )


def _is_hub_name(name: object) -> bool:
    return isinstance(name, str) and HUB_NAME.fullmatch(name) is not None


def _method(record: Mapping[str, Any]) -> list[str]:
    formula, used = [], []
    for name, weights in record["terms"].items():
        symbol = SYMBOLS[name]
        if weights["nll"]:
            formula.append(f"+ {_times(weights['nll'])}−log q({symbol})")
        if weights["kl"]:
            formula.append(f"+ {_times(weights['kl'])}KL(p‖q) on {symbol}")
        if weights["advantage"]:
            formula.append(f"− {_times(weights['advantage'])}Σ q·A on {symbol}")
        used += [term for term, weight in weights.items() if weight and term not in used]
    responses = "; ".join(f"{SYMBOLS[name]}: the {name} responses" for name in record["terms"])
    lines = [f"- {MEANINGS[term]}" for term in MEANINGS if term in used]
    if "advantage" in used and record["plausibility"]:
        kept = f"only where the teacher's probability of the token is at least {record['plausibility']:g}"
        lines.append(f"- A positive advantage counts {kept}.")
    lines += [f"- {responses}. Each term is a mean over the tokens of its responses."]
    if record["lora"]:
        settings = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in record["lora"].items())
        lines.append(f"- LoRA: {settings}; the adapters are merged into the weights.")
    loss = " ".join(formula).removeprefix("+ ")
    source = "[Advantage-Guided Distillation (Gao et al., ICLR 2025)](https://arxiv.org/abs/2502.17927)"
    return ["## Method", f"The loss is that of {source}:", f"```text\nloss = {loss}\n```", "\n".join(lines)]


def _times(weight: float) -> str:
    return "" if weight == 1 else f"{weight:g} · "


def _plain(value: Any) -> str:
    return (
        ", ".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if type(value) is float else str(value)
    )


def _data(record: Mapping[str, Any]) -> list[str]:
    rows = [["student before training", _model(record["student"])]]
    if scored := record.get("scored"):
        rows.append(["teacher", _model(scored["teacher"])])
        if scored["reference"]:
            rows.append(["reference", _model(scored["reference"])])
        rows.append(["signals", f"the teacher's top {scored['top_k']} tokens, {scored['dtype']}, {scored['engine']}"])
    for name, one in record.get("response_sets", {}).items():
        about = [f"{one['rows']:,}"]
        if made := one["record"]:
            about.append(
                f"from {_code(public_name(made['data']))}" + (f" split {made['split']}" if made["split"] else "")
            )
            about.append(f"read {made['time'][:10]}")
        if how := one["sampling"]:
            about.append(f"sampled by the student, temperature {how['temperature']:g}, top-p {how['top_p']:g}")
        counts = {"cut short": one["truncated_responses"], "with a prompt cut short": one["truncated_prompts"]}
        about += [f"{count:,} {what}" for what, count in counts.items() if count]
        rows.append([f"{name} responses", ", ".join(about)])
    return ["## Models and data", _table(["", ""], rows)]


def _model(identity: Mapping[str, Any]) -> str:
    name, digest = identity["name"].partition("@")[0], f"digest `{identity['digest'][:16]}`"
    if identity["revision"]:
        return f"[{name}](https://huggingface.co/{name}) (revision `{identity['revision'][:12]}`, {digest})"
    return f"{_code(last_part(identity['name']))} ({digest})"


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _repeat(record: Mapping[str, Any]) -> list[str]:
    if "options" not in record:
        return []
    commands = [each for each in (precompute_command(record), distill_command(record)) if each]
    note = "Files and directories are shown without the folders that they lie in; `cache` may be any directory."
    return ["## Repeat it", note, "```bash\n" + "\n\n".join(commands) + "\n```"]


def _results(record: Mapping[str, Any], curves: bool) -> list[str]:
    training, losses, held_out = record["training"], record["losses"], record.get("held_out") or []
    length = f"{record['steps']:,} steps of {training['batch_size']} examples ({record['examples']:,} in all)"
    precision = f"weights in {record['weights_dtype']}, computed in {record['compute_dtype']}"
    rate = f"learning rate {training['learning_rate']:g} ({training['lr_scheduler_type']})"
    ranks = f"{record['ranks']} processes, " if record["ranks"] > 1 else ""
    said = f"{length}, {rate}, {precision}, {ranks}{record['seconds']:,.0f} seconds."
    names = [name for name in losses[0] if name == "loss" or name.partition("/")[0] in MEANINGS]
    rows = [[name, f"{losses[0][name]:.4g}", f"{losses[-1].get(name, float('nan')):.4g}"] for name in names]
    parts = ["## Training", said, _table(["trained on", "first log", "last log"], rows)]
    if evaluated := {each["step"]: each["eval_loss"] for each in held_out if "eval_loss" in each}:
        parts += _held_out(evaluated, record)
    if record["warnings"]:
        parts.append("\n".join(f"- Warning: {warning}" for warning in record["warnings"]))
    if curves:
        parts.append(f"![curves of the run]({CURVES})")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [*parts, f"Versions: {versions}."]


def _held_out(losses: Mapping[int, float], record: Mapping[str, Any]) -> list[str]:
    """The losses on held-out examples by step, of many only three; and which student was kept."""
    steps, parts = list(losses), []
    if len(steps) > MOST_EVALUATIONS:
        parts.append(f"Of {len(steps):,} evaluations during training, the first, the best and the last:")
        steps = sorted({steps[0], min(losses, key=lambda step: losses[step]), steps[-1]})
    rows = [[str(step), f"{losses[step]:.4g}"] for step in steps]
    parts.append(_table(["step", "loss on held-out examples"], rows))
    if (kept := record.get("kept_step", record["steps"])) != record["steps"]:
        parts.append(f"The student is that of step {kept:,}, whose loss on held-out examples is the lowest.")
    return parts


def _evaluations(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = ["## Evaluation"] if evaluations else []
    for each in evaluations:
        settings, report = each["settings"], each["report"]
        models = [f"{name} {_code(public_name(settings[name]))}" for name in ("baseline", "teacher", "reference")]
        prompts = f"{report['prompts']:,} prompts of {_code(public_name(settings['data']))}"
        how = f"temperature {settings['temperature']:g}, seed {settings['seed']}"
        parts.append(f"{prompts}, {how}; {', '.join(models)} ({each['time'][:10]}):")
        rows = [[name.replace("_", " "), text, ""] for name, text in comparison(report).items()]
        rows += [[name.replace("_", " "), *texts] for name, texts in measures(report).items()]
        parts.append(_table(["", "student", "baseline"], rows))
    return [*parts, evaluations[-1]["report"]["note"]] if evaluations else []


def _use(name: str) -> list[str]:
    snippet = f"""```python
from transformers import pipeline

chat = pipeline("text-generation", {json.dumps(name, ensure_ascii=False)})  # this directory, or its name on the Hub
messages = [{{"role": "user", "content": "Say hello."}}]
print(chat(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])
```"""
    vllm, transformers = ("\n".join(lines(name)) for lines in (vllm_lines, transformers_lines))
    return [
        "## Use",
        snippet,
        "To serve it, and to chat with it in another terminal, with vLLM:",
        f"```bash\n{vllm}\n```",
        "or with transformers (`pip install 'transformers[serving]'`):",
        f"```bash\n{transformers}\n```",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
