"""Commands that look at the machine: doctor."""

from pipeline.errors import InputError


def doctor() -> None:
    """Say what this machine offers and what stands in the way: versions, devices, threads, memory, one FAISS build."""
    from pipeline.observe.doctor import examine

    if problems := examine(print):
        raise InputError("\n  ".join(["this machine is not ready:", *problems]))
    print("ready")
