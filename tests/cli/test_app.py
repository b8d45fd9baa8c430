"""merge_avg.cli._app: what the command takes, and what it asks of a task."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.helpers import run_command

HELP = os.environ | {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}


def test_dry_run_and_help_import_no_torch(folds, tmp_path):
    """--dry-run and --help write nothing and import neither torch nor numpy."""
    code = (
        "import sys\nfrom merge_avg.cli import main\ntry:\n    main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'\n"
    )
    for arguments in ([*folds, "-o", "out.pt", "--dry-run"], ["--help"], ["--version"]):
        command = [sys.executable, "-c", code, *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert not (tmp_path / "out.pt").exists()


def test_help_imports_no_task(tmp_path):
    """--help has its answer before anything that reads, plans or averages is imported."""
    code = (
        "import sys\nfrom merge_avg.cli import main\ntry:\n    main()\nexcept SystemExit: pass\n"
        "print(*(name for name in sys.modules if name.startswith('merge_avg.')), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    packages = {name.split(".")[1] for name in done.stderr.split()}
    assert packages <= {"cli", "errors", "options", "report", "_version"}


def test_an_option_is_explained_in_two_lines(tmp_path):
    """On 80 columns no option's help takes more than two lines, beside a default."""
    text = run_command("--help", cwd=tmp_path, env=HELP).stdout.partition("Options:\n")[2]
    lines = [line[34:] if line.startswith(" " * 34) else line for line in text.splitlines()]
    entries = [[]]
    for line in lines:
        if line.startswith("  -"):
            entries.append([line[34:]] if line[32:34] == "  " and line[34:] else [])
        else:
            entries[-1].append(line)
    assert len(entries) > 40
    for entry in entries:
        told = " ".join(entry).partition("[default")[0]
        assert len(textwrap.wrap(told, 46)) <= 2, told


def test_the_version_needs_no_checkpoints(command):
    """--version prints the version and nothing else."""
    from merge_avg import __version__

    assert command("--version") == (0, f"merge-avg {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-memory", "big"], "error: 'big' is not a size"),
        (["--max-shard-size", "5 apples"], "error: '5 apples' is not a size"),
        (["--steps", "5:1"], "error: the range '5:1' is empty"),
        (["-w", "1,x,2"], "error: the weight 'x' is not a finite number"),
        (["--missing", "ignore"], "Invalid value for '--missing'"),
        (["--agreement"], "No such option: --agreement"),
    ],
)
def test_wrong_values_are_wrong_usage(command, folds, arguments, message):
    """A value that cannot be parsed is exit code 2 with a message, and nothing is written."""
    code, out, err = command(*folds, "-o", "out.pt", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_template_by_path(command, folds):
    """The path ./2 is not the number 2, though no such file exists."""
    code, _, err = command(*folds, "-o", "out.pt", "--template", "./2")
    assert code == 1
    assert err.startswith("error: 2: ")
    code, out, err = command(*folds, "-o", "out.pt", "--template", "2", "--dry-run")
    assert (code, out) == (0, "")
