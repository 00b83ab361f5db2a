#!/usr/bin/env bash
# A team's cache in an object store: one machine scores, everybody trains from its signals.
#
# Install the client of the store and set its credentials. Only a store other than AWS needs the endpoint:
#
#   pip install -c constraints.txt -e '.[s3]'
#   export AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… AWS_ENDPOINT_URL=https://store.example.org
#   export CACHE=s3://bucket/team/cache
#
# Run it from the root of the repository. Once, on a machine that holds the large models:
#
#   TEACHER=org/large-dpo REFERENCE=org/large-sft DATA=prefs.jsonl bash examples/team_cache.sh score
#
# Then on any machine, by anybody, several at once. Each machine downloads a file of the cache once:
#
#   STUDENT=org/small OUTPUT=runs/dckd bash examples/team_cache.sh train
#
# From time to time:
#
#   bash examples/team_cache.sh check
#
# All other options are in examples/*.yaml. OPTIONS names another folder with these files.
set -euo pipefail

: "${CACHE:?s3://bucket/folder}"
OPTIONS=${OPTIONS:-examples}

case "${1:-}" in
score)
    adpa precompute --config "$OPTIONS/precompute.yaml" --teacher "${TEACHER:?}" --reference "${REFERENCE:?}" \
        --data "${DATA:?}" --cache "$CACHE"
    ;;
train)
    adpa distill --config "$OPTIONS/distill.yaml" --objective dckd \
        --student "${STUDENT:?}" --cache "$CACHE" --output "${OUTPUT:?}"
    ;;
check)
    adpa cache ls "$CACHE"
    adpa cache verify "$CACHE"
    ;;
*)
    echo "usage: bash examples/team_cache.sh score|train|check" >&2
    exit 2
    ;;
esac
