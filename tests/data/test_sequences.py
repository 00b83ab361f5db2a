import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from adpa.data.sequences import sequence_key

TOKEN_IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5) | st.lists(st.integers(0, 2), max_size=5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TOKEN_IDS, TOKEN_IDS, TOKEN_IDS, TOKEN_IDS)
def test_two_sequences_have_one_key_only_if_they_are_the_same(
    prompt: list[int], response: list[int], other_prompt: list[int], other_response: list[int]
) -> None:
    key, other = (
        sequence_key(np.array(ids, dtype=np.int32), np.array(others, dtype=np.int32))
        for ids, others in ((prompt, response), (other_prompt, other_response))
    )
    assert len(key) == 16
    assert (key == other) == ((prompt, response) == (other_prompt, other_response))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(TOKEN_IDS)
def test_the_key_tells_where_the_response_starts(ids: list[int]) -> None:
    whole = np.array(ids, dtype=np.int32)
    keys = {sequence_key(whole[:start], whole[start:]) for start in range(len(ids) + 1)}
    assert len(keys) == len(ids) + 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(TOKEN_IDS, TOKEN_IDS, st.sampled_from(["int64", "uint32", ">i4", "<i8"]))
def test_the_key_does_not_depend_on_the_width_of_the_integers(
    prompt: list[int], response: list[int], dtype: str
) -> None:
    narrow = sequence_key(np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32))
    assert sequence_key(np.array(prompt, dtype=dtype), np.array(response, dtype=dtype)) == narrow


def test_the_key_does_not_depend_on_how_the_ids_lie_in_memory() -> None:
    spread = np.arange(20, dtype=np.int32)[::2]
    assert sequence_key(spread[:4], spread[4:]) == sequence_key(spread[:4].copy(), spread[4:].copy())


def test_the_key_of_a_sequence_stays_the_same_from_version_to_version() -> None:
    """A cache outlives the program that wrote it."""
    key = sequence_key(np.array([1, 2, 3], dtype=np.int32), np.array([4, 5], dtype=np.int32))
    assert key.hex() == "2c9046d32753ef133cf64632700a8652"
