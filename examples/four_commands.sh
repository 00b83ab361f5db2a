#!/usr/bin/env bash
# The four commands on your own preference pairs (ADPA+), then a comparison with the untrained student.
#
# Models are local directories or names on the Hub. Run it from the root of the repository:
#
#   export TEACHER=org/large-dpo REFERENCE=org/large-sft STUDENT=org/small
#   export DATA=prefs.jsonl HELDOUT=heldout.jsonl CACHE=cache OUTPUT=runs
#   bash examples/four_commands.sh
#
# All other options are in examples/*.yaml. OPTIONS names another folder with these files.
set -euo pipefail

: "${TEACHER:?the large model after preference training}"
: "${REFERENCE:?the large model before preference training}"
: "${STUDENT:?the small model}"
: "${DATA:?a file of preference pairs to train on}"
: "${HELDOUT:?a file of other preference pairs, whose prompts both students answer}"
: "${CACHE:?a directory for the signals of the large models}"
: "${OUTPUT:?a directory for the trained students}"
OPTIONS=${OPTIONS:-examples}

# 1. The teacher scores the chosen and the rejected responses.
adpa precompute --config "$OPTIONS/precompute.yaml" --teacher "$TEACHER" --data "$DATA" --cache "$CACHE"

# 2. DCKD: the student learns the teacher's distributions on both.
adpa distill --config "$OPTIONS/distill.yaml" --objective dckd \
    --student "$STUDENT" --cache "$CACHE" --output "$OUTPUT/dckd"

# 3. The new student answers the prompts; teacher and reference score the answers.
adpa precompute --config "$OPTIONS/precompute.yaml" --teacher "$TEACHER" --reference "$REFERENCE" \
    --student "$OUTPUT/dckd" --data "$DATA" --cache "$CACHE"

# 4. ADPA: the student learns from the advantages of its own tokens.
adpa distill --config "$OPTIONS/distill.yaml" --objective adpa \
    --student "$OUTPUT/dckd" --cache "$CACHE" --output "$OUTPUT/adpa-plus"

adpa evaluate --config "$OPTIONS/evaluate.yaml" --student "$OUTPUT/adpa-plus" --baseline "$STUDENT" \
    --teacher "$TEACHER" --reference "$REFERENCE" --data "$HELDOUT" --report "$OUTPUT/evaluation.json"
