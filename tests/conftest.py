"""Settings and fixtures for all tests."""

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

import tests.older  # noqa: F401 - what older releases of torch lack

# No test may depend on the service that runs it, and tests add nothing to its page.
for variable in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
    os.environ.pop(variable, None)
# No test may depend on how fast the machine is.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Run the command within this process, in the test's own directory.

    Calling it returns the exit code, stdout and stderr. See `run_command` in tests/helpers.py for
    the command in a process of its own.
    """
    from merge_avg.cli import main

    monkeypatch.chdir(tmp_path)

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
