"""Programs that are run to their end, and what they must have ended with."""

import importlib.util
import os
import subprocess
from pathlib import Path

from naign.errors import BAD_INPUT
from tests.conftest import PYTHONPATH, ROOT, forked


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


def script(path):
    """The module of a file in the checkout."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(folder, files):
    """The package my_package with these files, as an installer leaves it; the path on which programs find it."""
    files = {"my_package/__init__.py": "", **files}
    files["my_package-1.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: my_package\nVersion: 1\n"
    for name, text in files.items():
        file = folder / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return f"{PYTHONPATH}{os.pathsep}{folder}/site"


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
