"""Kill real runs of the command, and make their system calls fail: see tests/promises/crashing.py.

    python scripts/crash.py kill --count 300      SIGKILL, SIGTERM, SIGINT, SIGHUP at random moments
    python scripts/crash.py calls                 SIGKILL at each system call (needs strace)
    python scripts/crash.py inject                a failure of each system call (needs strace)

It prints how many runs ended in which way, and exits with 1 where a promise was broken.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    command = [sys.executable, "-W", "ignore", "-m", "tests.promises.crashing", *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)
