#!/usr/bin/env bash
# ADPA+ as in the paper: the teacher pair by TRL, then DCKD, then ADPA on the student's own responses.
#
# BASE is a large model without preference training, STUDENT a small one of the same vocabulary after SFT. Models are
# local directories or names on the Hub. The options are in examples/recipes/paper; OPTIONS names another folder with these
# files. Run it from the root of the repository:
#
#   pip install -c constraints.txt -e '.[lab]'     # TRL
#   export BASE=org/large STUDENT=org/small-sft DATA=prefs.jsonl HELDOUT=heldout.jsonl CACHE=cache OUTPUT=runs
#   bash examples/recipes/paper.sh
set -euo pipefail

: "${BASE:?the large model}"
: "${STUDENT:?the small model, after SFT}"
: "${DATA:?a JSONL file of preference pairs to train on}"
: "${HELDOUT:?a file of other preference pairs}"
: "${CACHE:?a directory for the signals of the large models}"
: "${OUTPUT:?a directory for the trained models}"
OPTIONS=${OPTIONS:-examples/recipes/paper}
teacher=$OUTPUT/teacher reference=$OUTPUT/reference

# SFT makes the reference; DPO of the reference with β = 0.01 makes the teacher.
python examples/teacher_pair.py --base "$BASE" --data "$DATA" --beta 0.01 \
    --reference "$reference" --teacher "$teacher"

adpa precompute --config "$OPTIONS/precompute.yaml" --teacher "$teacher" --data "$DATA" --cache "$CACHE"
adpa distill --config "$OPTIONS/dckd.yaml" --student "$STUDENT" --cache "$CACHE" --output "$OUTPUT/dckd"

adpa precompute --config "$OPTIONS/precompute.yaml" --teacher "$teacher" --reference "$reference" \
    --student "$OUTPUT/dckd" --data "$DATA" --cache "$CACHE"
adpa distill --config "$OPTIONS/adpa.yaml" --student "$OUTPUT/dckd" --cache "$CACHE" --output "$OUTPUT/adpa-plus"

adpa evaluate --config "$OPTIONS/evaluate.yaml" --student "$OUTPUT/adpa-plus" --baseline "$STUDENT" \
    --teacher "$teacher" --reference "$reference" --data "$HELDOUT" --report "$OUTPUT/evaluation.json"
