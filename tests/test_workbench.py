"""An error is one sentence, whatever it quotes."""

import pytest

from workbench import WorkbenchError


@pytest.mark.parametrize("quoted", ["a\nb", "\x1b[2J", "\u2028", "\0", "\ud800"])
def test_an_error_stays_on_its_line_and_moves_no_cursor(quoted):
    said = str(WorkbenchError(f"`{quoted}` is none: choose another."))
    assert said.isprintable()
    assert said.endswith("` is none: choose another.")
    assert said.encode()  # what is no text would break the printing of it


def test_an_error_that_quotes_megabytes_keeps_its_beginning_and_end():
    said = str(WorkbenchError(f"`{'x' * 10**6}` is none: choose another."))
    assert said.startswith("`xxx")
    assert said.endswith("` is none: choose another.")
    assert len(said) < 2000
