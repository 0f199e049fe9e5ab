"""The command that prints a shell's completion script: tyro's, with two things mended."""

import contextlib
import io
import re
from typing import Literal

import tyro
from tyro.conf import Positional

FILES = {
    "bash": ("complete -F", "complete -o default -F"),
    "zsh": ('if [[ "$completions" ==', 'if [[ -z "$completions" || "$completions" =='),
    "fish": ("complete --no-files", "complete"),
}
"""By shell what to replace by what, so that where no option and no command fits, files do."""


def completion(shell: Positional[Literal["bash", "zsh", "fish"]], /) -> None:
    """Print the script that completes commands and options in a shell; docs/tools.md says where to put it.

    Bash: eval "$(naign completion bash)" in ~/.bashrc. Zsh: naign completion zsh > ~/.zfunc/_naign.
    Fish: naign completion fish > ~/.config/fish/completions/naign.fish.

    Args:
        shell: Whose script to print.
    """
    from pipeline.cli.cluster import launch, launch_options, train
    from pipeline.cli.main import COMMANDS

    commands = COMMANDS | {command.__name__: launch_options(command) for command in (train, launch)}
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(commands, prog="naign", args=["--tyro-print-completion", shell])
    lines = script.getvalue().replace(*FILES[shell]).splitlines()
    for line in lines:  # a line break within a description would end a candidate
        print(re.sub(r"\\+n", " ", line) if "COMPLETION_SPEC = {" in line else line)
