"""A precompute run that is killed at any moment leaves no damage, and a rerun goes on where it stopped."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.conftest import Models, Row

from adpa import precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.shards import list_shards, read_shard
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.pipeline.scoring.jobs import make_batches

# The real command. It notes every sequence on disk before a model scores it.
SCRIPT = """
from adpa.cli import main
from adpa.pipeline.scoring.hf_scorer import HfDecoder

hidden = HfDecoder._hidden

def noting(self, batch):
    with open("asked", "a") as log:
        log.write("".join(f"{self._model.name_or_path} {sequence.key.hex()}\\n" for sequence in batch))
    return hidden(self, batch)

HfDecoder._hidden = noting
main()
"""
KILLS = 20
BATCH_TOKENS = 240


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_damage_nothing_and_cost_two_batches_each(
    models: Models, preference_rows: list[Row], tmp_path: Path
) -> None:
    rows = [
        {**row, "prompt": [{"role": "user", "content": f"{row['prompt'][0]['content']} {repetition}"}]}
        for row in preference_rows
        for repetition in range(15)
    ]
    data, cache = tmp_path / "prefs.jsonl", tmp_path / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "--teacher": models.teacher,
        "--reference": models.reference,
        "--data": data,
        "--cache": cache,
        "--batch-tokens": BATCH_TOKENS,
    }
    command = [sys.executable, "-c", SCRIPT, "precompute", *(str(part) for pair in options.items() for part in pair)]
    generator = random.Random(0)

    share = 2 * 2 * len(rows) // (KILLS + 5)  # of all sequences for both models, at any speed of the machine
    for _ in range(KILLS):
        noted = lines(tmp_path / "asked")
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        while process.poll() is None and lines(tmp_path / "asked") == noted:
            time.sleep(0.001)
        end = time.monotonic() + generator.uniform(0, 0.4)
        while time.monotonic() < end and lines(tmp_path / "asked") < noted + share:
            time.sleep(0.001)
        process.kill()
        assert process.wait() != 0, "the run ended before it was killed"

    last = precompute(
        teacher=str(models.teacher),
        reference=str(models.reference),
        data=str(data),
        cache=cache,
        batch_tokens=BATCH_TOKENS,
    )
    assert last.scored > 0, "the last run had nothing left to do"
    (scoring,) = read_scorings(cache)
    signals = read_signals(cache, scoring)
    sequences = [sequence for found in read_response_sets(cache) for sequence in found.sequences()]
    assert signals.keys() == {sequence.key for sequence in sequences}

    asked = Counter((tmp_path / "asked").read_text().split("\n"))
    again = sum(count - 1 for line, count in asked.items() if line)
    largest = max(map(len, make_batches(sequences, len, BATCH_TOKENS)))
    assert again <= KILLS * 2 * largest, "more than the batch being computed and the one being written"
    in_cache = [key for table in shards(cache) for key in table]
    assert len(in_cache) == len(set(in_cache)), "a row was written twice"


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def shards(cache: Path) -> list[list[bytes]]:
    (folder,) = (cache / "scorings").iterdir()
    return [read_shard(path)["key"].to_pylist() for path in list_shards(folder, "signals")]
