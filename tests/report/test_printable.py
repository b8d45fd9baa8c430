"""Text that is safe to show on a terminal and in the log of a CI job."""

import pytest

from merge_avg.report.printable import printable


@pytest.mark.parametrize("text", ["plain.pt", "é漢 a:b", "#1", "a::b", "[red]"])
def test_ordinary_names_stay(text):
    """Letters of any language, and signs that mean nothing, are shown as they are."""
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\r", "a\\nb\\r"),
        ("\u202ea", "\\u202ea"),
        ("\udc80", "\\udc80"),
    ],
)
def test_controls_are_escaped(text, shown):
    """Escapes, line ends, changes of direction and undecodable bytes are written out."""
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["::error::x", "  ::warning::x", "a##[group]b"])
def test_a_runner_gets_no_commands(text):
    """GitHub's runner finds neither of its two forms of commands."""
    shown = printable(text)
    assert not shown.lstrip().startswith("::")
    assert "##[" not in shown
