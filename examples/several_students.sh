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
        --teacher "$TEACHER" --reference "$REFERENCE" --data "$HELDOUT" --cache "$CACHE"
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

adpa runs "$OUTPUT"
