"""Samples: a student's responses to prompts, stored batch by batch until they form a response set.

They lie in ``CACHE/samples/<id>/`` in immutable shards. The id is the digest of the sampling settings. The key of a row
is the digest of the prompt and the index of the sample.
"""

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from adpa.data.cache.locations import Location
from adpa.data.cache.ragged import list_column, list_row
from adpa.data.cache.responses import Sampling
from adpa.data.cache.shards import damaged, open_shards, write_shard
from adpa.data.sequences import TokenIds, sequence_key

SHARD_PREFIX = "samples"
SCHEMA = pa.schema([("key", pa.binary(16)), ("response_ids", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class SampleRequest:
    """One response to sample: the prompt, and the number of the response among those to this prompt."""

    prompt_ids: TokenIds
    index: int

    @property
    def key(self) -> bytes:
        """16 bytes, equal for equal prompt and index."""
        return sequence_key(self.prompt_ids, np.array([self.index], dtype=np.int32))


def read_samples(cache: Location, sampling: Sampling) -> dict[bytes, TokenIds]:
    """The responses that a cache already has for these settings: int32 [T] by the request's key.

    Raises:
        DamagedFileError: a file differs from what was written.
    """
    samples: dict[bytes, TokenIds] = {}
    for path, table in open_shards(samples_folder(cache, sampling), SHARD_PREFIX):
        for row, key in enumerate(check_samples(path, table)["key"].to_pylist()):
            samples.setdefault(key, list_row(table["response_ids"], row))
    return samples


def check_samples(path: Location, table: pa.Table) -> pa.Table:
    """Checks that a shard has the columns of samples, and returns its table.

    Raises:
        DamagedFileError: they are not.
    """
    if not table.schema.equals(SCHEMA):
        raise damaged(path, "its columns are not those of samples")
    return table


def missing_requests(samples: Container[bytes], requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """The distinct requests without a response in the result of ``read_samples``."""
    return list({request.key: request for request in requests if request.key not in samples}.values())


def write_samples(
    cache: Location, sampling: Sampling, requests: Sequence[SampleRequest], responses: Sequence[TokenIds]
) -> Location:
    """Adds the responses to some requests, int32 [T] each, as one shard, and returns it."""
    columns = [
        pa.array([request.key for request in requests], SCHEMA.field("key").type),
        list_column(responses, SCHEMA.field("response_ids").type),
    ]
    return write_shard(samples_folder(cache, sampling), SHARD_PREFIX, pa.Table.from_arrays(columns, schema=SCHEMA))


def samples_folder(cache: Location, sampling: Sampling) -> Location:
    """The folder of the samples of these settings; their number does not matter."""
    settings = sampling.settings()
    del settings["samples_per_prompt"]  # a larger number reuses the existing samples
    digest = hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=8)
    return cache / "samples" / digest.hexdigest()
