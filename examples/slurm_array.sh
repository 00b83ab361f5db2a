#!/usr/bin/env bash
#SBATCH --job-name=adpa
#SBATCH --gpus=1
#SBATCH --output=%x-%j.log
#
# A Slurm array shares stage one: each task samples and scores its part of the data. Then one job trains the student.
#
# The tasks share only the cache, so CACHE must be on a file system that all machines see, or in an object store.
# Run it from the root of the repository:
#
#   export TEACHER=org/large-dpo REFERENCE=org/large-sft STUDENT=org/small
#   export DATA=prefs.jsonl CACHE=/shared/cache OUTPUT=/shared/runs/adpa N=16
#   parts=$(sbatch --parsable --array="1-$N" examples/slurm_array.sh)
#   sbatch --dependency="afterok:$parts" examples/slurm_array.sh
#
# If a task fails, submit it again with the same number, for example with --array=3, and then the second job.
# All other options are in examples/*.yaml. OPTIONS names another folder with these files.
set -euo pipefail

: "${TEACHER:?the large model after preference training}"
: "${REFERENCE:?the large model before preference training}"
: "${STUDENT:?the small model; for ADPA+ one that dckd trained}"
: "${DATA:?a file of preference pairs}"
: "${CACHE:?a directory that all machines see, or s3://bucket/folder}"
: "${OUTPUT:?a directory for the trained student}"
: "${N:?the number of parts}"
OPTIONS=${OPTIONS:-examples}

if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    adpa precompute --config "$OPTIONS/precompute.yaml" --teacher "$TEACHER" --reference "$REFERENCE" \
        --student "$STUDENT" --data "$DATA" --cache "$CACHE" --part "$SLURM_ARRAY_TASK_ID/$N"
else
    adpa distill --config "$OPTIONS/distill.yaml" --objective adpa \
        --student "$STUDENT" --cache "$CACHE" --output "$OUTPUT"
fi
