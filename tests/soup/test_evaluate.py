"""The score that the user's own command prints."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from merge_avg.errors import MergeError, UsageError
from merge_avg.soup import _evaluate as evaluate
from merge_avg.soup import score


def command(code):
    return f'"{sys.executable}" -c "{code}" {{}}'


@pytest.mark.parametrize(
    ("printed", "value"),
    [
        ("acc: 0.93", 0.93),
        ("93.1%", 93.1),
        ("1e-3", 1e-3),
        ("-2", -2.0),
        ("+.5", 0.5),
        ("3 of 4 images\\nscore=0.75.", 0.75),
        ("loss 1.5\\nepoch3 v2 done", 1.5),
        ("0.5\\n", 0.5),
        ("0.5 from checkpoint-500.pt in 1.5s", 0.5),
        ("inf", float("inf")),
    ],
)
def test_the_last_number_counts(tmp_path, printed, value):
    """The score is the last number on stdout; digits within words do not count."""
    assert score(command(f"print('{printed}')"), tmp_path / "a.pt") == value


@pytest.mark.parametrize(
    ("printed", "key", "value"),
    [
        ("{'a': 1, 'b': 2}", "a", 1.0),
        ("{'eval': {'acc': 0.5}}", "eval.acc", 0.5),
        ("{'eval.acc': 0.25}", "eval.acc", 0.25),
        ("loading\\n{'a': 1}\\n{'a': 3}\\nbye", "a", 3.0),
    ],
)
def test_a_key_of_json(tmp_path, printed, key, value):
    """With a key, the score is that entry of the last JSON object that has one."""
    code = f"print('''{printed}'''.replace(chr(39), chr(34)))"
    assert score(command(code), tmp_path / "a.pt", key) == value


def test_the_path_is_an_argument(tmp_path):
    """{} stands for the path, is added where it is missing, and no shell sees what is in it."""
    odd = tmp_path / "a b; echo 7 $HOME.pt"
    code = "import sys; print(len(sys.argv), 5 if sys.argv[-1].endswith('.pt') else 6)"
    assert score(f'"{sys.executable}" -c "{code}"', odd) == 5
    code = "import sys; print(sys.argv[1] == '--x=' + sys.argv[2], len(sys.argv))"
    assert score(f'"{sys.executable}" -c "{code}" --x={{}} {{}}', odd) == 3


@pytest.mark.parametrize(
    ("code", "key", "words"),
    [
        ("import sys; print(0.5); sys.exit('no data')", None, r"failed \(code 1\): no data"),
        ("import os; os.kill(os.getpid(), 9)", None, r"failed \(signal 9\)"),
        ("pass", None, "printed no number"),
        ("print('nothing here')", None, "no number: nothing here"),
        ("print('[1, 2]')", "a", "no number 'a' in a JSON object"),
        ("print('{}')", "a", "no number 'a' in a JSON object"),
        ("print('[' + '{}]')", "a", "no number 'a' in a JSON object"),
        ("import json; print(json.dumps(dict(a=True)))", "a", "no number 'a' in a JSON object"),
        ("import json; print(json.dumps(dict(a=10**400)))", "a", "no number 'a' in a JSON object"),
        ("print('0.5 nan')", None, "printed NaN"),
    ],
)
def test_a_failing_or_silent_command(tmp_path, code, key, words):
    """A command that fails or prints no score is an error with its output and the checkpoint."""
    with pytest.raises(MergeError, match=words) as caught:
        score(f'"{sys.executable}" -c "{code}"', tmp_path / "a.pt", key)
    assert str(caught.value.where) == str(tmp_path / "a.pt")


def test_long_output_is_cut(tmp_path):
    """Of a long output, a message shows the end."""
    with pytest.raises(MergeError) as caught:
        score(command("print('x' * 100000 + 'end')"), tmp_path / "a.pt")
    assert len(caught.value.what) < 3000
    assert "xend" in caught.value.what


@pytest.mark.parametrize(
    ("text", "error"), [("", UsageError), ("'", UsageError), ("/no/such/program", MergeError)]
)
def test_commands_that_cannot_be_run(text, error):
    """An empty or broken command is a usage error; a program that does not exist is an error."""
    with pytest.raises(error):
        score(text, Path("a.pt"))


def test_an_interruption_ends_the_evaluation(tmp_path):
    """Ctrl-C leaves no evaluation running behind."""
    mark = tmp_path / "mark"
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    line = f"""
import signal, sys, threading, time, os
from pathlib import Path
from merge_avg.soup._evaluate import score
def stop():
    while not (Path({str(mark)!r}).exists() and Path({str(mark)!r}).read_text()):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
threading.Thread(target=stop).start()
score({shlex.join([sys.executable, "-c", code, str(mark)])!r}, Path("a.pt"))
"""
    program = [sys.executable, "-c", line]
    done = subprocess.run(program, check=False, timeout=50, capture_output=True)
    assert b"KeyboardInterrupt" in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_backslashes_of_windows_are_parts_of_names(monkeypatch, tmp_path):
    """On Windows a backslash is no escape; quotes group words there too."""
    told = []
    monkeypatch.setattr(evaluate, "_run", lambda words: told.append(words) or (0, "1", ""))
    for windows, last in ((True, "x\\y"), (False, "xy")):
        monkeypatch.setattr(evaluate, "WINDOWS", windows)
        score(r'"C:\a b\e.py" x\y {}', tmp_path)
        assert told.pop() == ["C:\\a b\\e.py", last, str(tmp_path)]
