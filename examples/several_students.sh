#!/usr/bin/env bash
# Several students and several γ from one cache, compared in one table.
#
# The large models score the data once. Every student then learns from the same signals: first by plain SFT, the
# control, which trains as long without the teacher; then by ADPA on the chosen responses, once for each γ.
# Run it from the root of the repository:
#
#   export TEACHER=org/large-dpo REFERENCE=org/large-sft STUDENTS="org/small org/tiny" GAMMAS="0.25 0.5 1"
#   export DATA=prefs.jsonl HELDOUT=heldout.jsonl CACHE=cache OUTPUT=runs
#   bash examples/several_students.sh
#
# All other options are in examples/*.yaml. OPTIONS names another folder with these files.
set -euo pipefail

: "${TEACHER:?the large model after preference training}"
: "${REFERENCE:?the large model before preference training}"
: "${STUDENTS:?small models, with spaces between them}"
: "${DATA:?a file of preference pairs to train on}"
: "${HELDOUT:?a file of other preference pairs, whose prompts all students answer}"
: "${CACHE:?a directory for the signals of the large models}"
: "${OUTPUT:?a directory for the trained students}"
GAMMAS=${GAMMAS:-0.25 0.5 1}
OPTIONS=${OPTIONS:-examples}

# Trains a student in a folder of its own and compares it with itself before training.
# Arguments: the student, the name of the folder, the options of `adpa distill`.
run() {
    local student=$1 output=$OUTPUT/$2
    adpa distill --config "$OPTIONS/distill.yaml" "${@:3}" \
        --student "$student" --cache "$CACHE" --output "$output"
    # --cache keeps the answers and their scores: the untrained student answers only once.
    adpa evaluate --config "$OPTIONS/evaluate.yaml" --student "$output" --baseline "$student" \
        --teacher "$TEACHER" --reference "$REFERENCE" --data "$HELDOUT" --cache "$CACHE" \
        --report "$output/evaluation.json"
}

adpa precompute --config "$OPTIONS/precompute.yaml" --teacher "$TEACHER" --reference "$REFERENCE" \
    --data "$DATA" --cache "$CACHE" --responses chosen

for student in $STUDENTS; do
    name=$(basename "$student")
    run "$student" "$name/sft" --objective sft
    for gamma in $GAMMAS; do
        run "$student" "$name/adpa-$gamma" --objective adpa --on chosen --advantage-weight "$gamma"
    done
done

python3 - "$OUTPUT"/*/*/evaluation.json <<'END'
import json
import sys
from pathlib import Path

print(f"{'student':24} {'training':12} {'win rate':>8} {'95 % interval':>16} {'tokens':>7} {'repetition':>10}")
for path in map(Path, sys.argv[1:]):
    report = json.loads(path.read_text())
    wins, answers = report["win_rate"], report["student"]
    interval = f"[{wins['low']:.3f}, {wins['high']:.3f}]"
    print(
        f"{path.parts[-3]:24} {path.parts[-2]:12} {wins['mean']:8.3f} {interval:>16}"
        f" {answers['tokens']:7.1f} {answers['repetition']:10.3f}"
    )
END
