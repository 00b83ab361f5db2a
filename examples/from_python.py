"""The four commands and an evaluation from Python, each a function that returns a report.

The functions take the options of the commands, by the same names. Run it from the root of the repository:

    python examples/from_python.py --teacher org/large-dpo --reference org/large-sft --student org/small \\
        --data prefs.jsonl --heldout heldout.jsonl --cache cache --output runs
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import adpa
from adpa.errors import AdpaError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="the large model after preference training")
    parser.add_argument("--reference", required=True, help="the large model before preference training")
    parser.add_argument("--student", required=True, help="the small model")
    parser.add_argument("--data", required=True, help="file of preference pairs to train on")
    parser.add_argument("--heldout", required=True, help="file of other pairs, whose prompts both students answer")
    parser.add_argument("--cache", required=True, type=Path, help="directory for the signals of the large models")
    parser.add_argument("--output", required=True, type=Path, help="directory for the trained students")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens of an answer at most (default: 512)")
    try:
        align(**vars(parser.parse_args()))
    except AdpaError as error:  # a mistake in the options, the data, the models or the cache
        raise SystemExit(f"from_python.py: {error}") from None


def align(
    teacher: str,
    reference: str,
    student: str,
    data: str,
    heldout: str,
    cache: Path,
    output: Path,
    max_new_tokens: int,
) -> None:
    """ADPA+: DCKD from the teacher's signals, then ADPA on the new student's own answers."""
    scored = adpa.precompute(teacher=teacher, data=data, cache=cache)
    print(f"scored {scored.scored} responses of {scored.tokens} tokens; {scored.reused} were in the cache")

    dckd = adpa.distill(objective="dckd", student=student, cache=cache, output=output / "dckd")
    print(f"DCKD: loss {dckd.first_loss:.3f} to {dckd.last_loss:.3f} in {dckd.steps} steps")

    sampled = adpa.precompute(
        teacher=teacher,
        reference=reference,
        student=dckd.output,
        data=data,
        cache=cache,
        max_new_tokens=max_new_tokens,
    )
    print(f"sampled {sampled.sampled} answers; {sampled.truncated_responses} did not end by themselves")

    adpa_plus = adpa.distill(objective="adpa", student=dckd.output, cache=cache, output=output / "adpa-plus")
    for warning in adpa_plus.warnings:
        print(f"warning: {warning}")

    verdict = adpa.evaluate(
        student=adpa_plus.output,
        baseline=student,
        teacher=teacher,
        reference=reference,
        data=heldout,
        cache=cache,
        max_new_tokens=max_new_tokens,
    )
    wins = verdict.win_rate
    print(f"win rate against {student}: {wins.mean:.3f} [{wins.low:.3f}, {wins.high:.3f}]")
    (output / "evaluation.json").write_text(json.dumps(asdict(verdict), indent=2) + "\n")


if __name__ == "__main__":
    main()
