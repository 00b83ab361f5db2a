"""What the benchmark of start-up times."""

from benchmarks.start_up import MISTAKES, commands, seconds
from tests.commands import COMMANDS


def test_every_command_is_timed() -> None:
    assert {" ".join(words) for words in commands()} == {"", "cache", *COMMANDS}


def test_a_mistake_is_timed_too() -> None:
    assert [" ".join(words) for words in MISTAKES] == ["precompute --techer x", "distill"]
    assert 0 < seconds(*MISTAKES[0]) < 60
