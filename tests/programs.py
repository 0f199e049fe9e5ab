"""Programs that are run to their end, and what they must have ended with."""

import subprocess

from naign.errors import BAD_INPUT
from tests.conftest import forked


def execute(command, folder=None, *, env=None, timeout=300):
    """Run a command in a folder to its end; `env` is that of forked() unless given."""
    return subprocess.run(
        command,
        cwd=folder,
        env=env or forked(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def succeeded(done):
    """The program, which must have ended with code 0."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def ends(job, code, *said, timeout=200):
    """A started program must end with this code, with these words and no traceback; what it said."""
    errors = job.communicate(timeout=timeout)[1]
    assert job.returncode == code, errors
    assert "Traceback" not in errors
    for part in said:
        assert part in errors
    return errors


def refused(done, *said):
    """The program must have ended as bad input, with these words and no traceback."""
    assert done.returncode == BAD_INPUT, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for part in said:
        assert part in done.stderr
