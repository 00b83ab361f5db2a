"""What goes to standard error while a command works."""

import logging

import pytest

from adpa.progress import WarningLines


@pytest.mark.parametrize("text", ["two\nlines", "  two \n\n lines\t", "two lines"])
def test_a_warning_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("adpa")
    logger.addHandler(WarningLines())
    logger.warning("%s of %d", text, 3)
    assert capsys.readouterr().err == "adpa: warning: two lines of 3\n"
