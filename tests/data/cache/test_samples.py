"""Samples are read by prompt and index, for the settings that they were sampled with."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from adpa.data.cache.responses import Sampling
from adpa.data.cache.samples import SampleRequest, missing_requests, read_samples, write_samples

SAMPLING = Sampling("s", 2, 1.0, 1.0, 8, 1, 0, "float32", "hf")


def request(*prompt: int, index: int = 0) -> SampleRequest:
    return SampleRequest(np.array(prompt, dtype=np.int32), index)


def test_what_was_written_is_found_and_the_rest_is_missing(tmp_path: Path) -> None:
    requests = [request(1, 2), request(1, 2, index=1), request(3)]
    write_samples(tmp_path, SAMPLING, requests[:1], [np.array([5, 2], dtype=np.int32)])
    write_samples(tmp_path, SAMPLING, requests[1:2], [np.array([6], dtype=np.int32)])
    samples = read_samples(tmp_path, SAMPLING)
    assert [samples[one.key].tolist() for one in requests[:2]] == [[5, 2], [6]]
    assert missing_requests(read_samples(tmp_path, SAMPLING), requests) == requests[2:]


def test_a_request_that_is_made_twice_is_missing_once(tmp_path: Path) -> None:
    assert len(missing_requests({}, [request(1), request(1)])) == 1


def test_other_settings_have_other_samples_and_more_to_a_prompt_have_the_same(tmp_path: Path) -> None:
    write_samples(tmp_path, SAMPLING, [request(1)], [np.array([5], dtype=np.int32)])
    for other in ({"seed": 1}, {"temperature": 0.5}, {"student": "t"}, {"top_p": 0.9}, {"max_new_tokens": 9}):
        assert read_samples(tmp_path, replace(SAMPLING, **other)) == {}
    assert read_samples(tmp_path, replace(SAMPLING, samples_per_prompt=4)).keys() == {request(1).key}
