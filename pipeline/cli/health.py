"""Commands that look at the machine: doctor."""

from tqdm import tqdm

from pipeline.cli.output import Json, lines_to_stderr, print_json
from pipeline.errors import InputError
from pipeline.terminal import busy


def doctor(*, json: Json = False) -> None:
    """Check this machine: versions, devices, threads, memory, FAISS."""
    from pipeline.observe.doctor import CHECKS, Finding, Needs, findings, problems

    examined = list[Finding]()
    with busy("examining this machine"), lines_to_stderr(json):
        for finding in findings(Needs(), CHECKS):
            examined.append(finding)
            if not json:
                tqdm.write(finding.text)  # a line above the progress
    wrong = problems(examined)
    if json:
        print_json({"ready": not wrong, "findings": [finding._asdict() for finding in examined]})
    if wrong:
        raise InputError("\n  ".join(["this machine is not ready:", *wrong]))
    if not json:
        print("ready")
