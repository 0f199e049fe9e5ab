"""Commands that look at the machine: doctor."""

from tqdm import tqdm

from pipeline.cli.output import Json, lines_to_stderr, print_json
from pipeline.errors import InputError
from pipeline.terminal import busy


def doctor(*, json: Json = False) -> None:
    """Say what this machine offers and what stands in the way: versions, devices, threads, memory, one FAISS build."""
    from pipeline.observe.doctor import CHECKS, Finding, Needs, findings

    found = list[Finding]()
    with busy("examining this machine"), lines_to_stderr(json):
        for one in findings(Needs(), CHECKS):
            found.append(one)
            if not json:
                tqdm.write(one.found)  # a line above the progress
    problems = [f"{one.found}: {one.remedy}" for one in found if one.remedy]
    if json:
        print_json({"ready": not problems, "findings": [one._asdict() for one in found]})
    if problems:
        raise InputError("\n  ".join(["this machine is not ready:", *problems]))
    if not json:
        print("ready")
