"""A step has the same examples however it is cut into micro-batches and dealt out to ranks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from adpa.data.steps import StepSampler


def deal(sampler: StepSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    examples=st.integers(1, 40),
    micro_batch_size=st.integers(1, 5),
    micro_batches=st.integers(1, 4),
    ranks=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_every_example_is_in_one_step_of_an_epoch_whoever_takes_it(
    examples: int, micro_batch_size: int, micro_batches: int, ranks: int, epoch: int
) -> None:
    step_examples = micro_batch_size * micro_batches * ranks
    (order,) = deal(StepSampler(examples, examples, 1, seed=7), epoch)
    assert sorted(order) == list(range(examples))
    samplers = [StepSampler(examples, micro_batch_size, micro_batches, ranks, rank, 7) for rank in range(ranks)]
    dealt = [deal(sampler, epoch) for sampler in samplers]
    assert len({len(micro) for micro in dealt}) == 1
    assert len(dealt[0]) == len(samplers[0])
    assert all(len(batch) <= micro_batch_size for micro in dealt for batch in micro)
    for number in range(0, len(dealt[0]), micro_batches):
        steps = [micro[number : number + micro_batches] for micro in dealt]
        start = number // micro_batches * step_examples
        taken = [example for step in steps for batch in step for example in batch]
        assert taken == order[start : start + step_examples]


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    orders = [deal(StepSampler(30, 30, 1, seed=seed), epoch)[0] for seed, epoch in ((0, 0), (0, 1), (0, 2), (5, 0))]
    assert len({tuple(order) for order in orders}) == 4
    assert deal(StepSampler(30, 30, 1, seed=5), 0)[0] == orders[3]


def test_only_the_last_step_of_an_epoch_is_shorter() -> None:
    assert [len(batch) for batch in StepSampler(13, 2, 2)] == [2, 2, 2, 2, 2, 2, 1]
    assert [[len(batch) for batch in StepSampler(13, 2, 1, 2, rank)] for rank in (0, 1)] == [[2, 2, 2, 1], [2, 2, 2, 0]]
