"""A pseudo-terminal to run commands on."""

import os
import struct
import subprocess


def on_terminal(command, columns=80, **options):
    """Run a command whose stderr is a terminal of so many columns; return what it shows there.

    The command has to succeed.
    """
    import fcntl
    import pty
    import termios  # where a test of other systems takes them away, others still run

    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    shown = b""
    with subprocess.Popen(command, stderr=writer, stdout=subprocess.DEVNULL, **options) as running:
        os.close(writer)
        while True:
            try:
                shown += os.read(reader, 1 << 16)
            except OSError:  # the other end is closed
                break
    os.close(reader)
    assert running.returncode == 0
    return shown.decode()
