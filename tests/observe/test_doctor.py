"""The doctor finds what would go wrong later."""

from pipeline.observe.doctor import examine, faiss_problems


def test_this_machine_is_described_and_ready():
    lines = []
    assert examine(lines.append) == []
    text = "\n".join(lines)
    assert "torch" in text and "FAISS: faiss-cpu" in text and "cores" in text


def test_two_builds_of_faiss_are_a_problem():
    assert faiss_problems(["faiss-cpu 1.15.1"]) == []
    (problem,) = faiss_problems(["faiss-cpu 1.15.1", "faiss-gpu-cu12 1.12.0"])
    assert "pip uninstall -y faiss-cpu faiss-gpu-cu12" in problem
    assert "missing" in faiss_problems([])[0]
