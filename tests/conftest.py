"""What holds for all tests: none depends on how fast the machine is. And what many of them need."""

import sys

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Run the command in a directory of its own; return its exit code, stdout and stderr."""
    from merge_avg.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["merge-avg", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
