"""The doctor finds what would go wrong later."""

import pytest

from pipeline.errors import InputError
from pipeline.observe.doctor import CHECKS, Needs, endpoint, faiss, findings, preflight, problems


def test_this_machine_is_described_and_ready():
    examined = [*findings(Needs(), CHECKS)]
    assert problems(examined) == []
    text = "\n".join(finding.text for finding in examined)
    assert "torch" in text and "FAISS: faiss-cpu" in text and "cores" in text and "disk here" in text
    assert "trackers of the default configuration: jsonl, tensorboard" in text


@pytest.mark.parametrize(
    ("builds", "remedy"),
    [
        (["faiss-cpu 1.15.1"], ""),
        (["faiss-cpu 1.15.1", "faiss-gpu-cu12 1.12.0"], "pip uninstall -y faiss-cpu faiss-gpu-cu12"),
        ([], "pip install faiss-cpu"),
    ],
)
def test_one_build_of_faiss_is_wanted(monkeypatch, builds, remedy, tmp_path):
    monkeypatch.setattr("pipeline.observe.doctor.faiss_builds", lambda: builds)
    wrong = problems(findings(Needs(), [faiss]))
    assert len(wrong) == bool(remedy) and all(remedy in problem for problem in wrong)
    if len(builds) > 1:  # a run cannot tell which code it would search with
        with pytest.raises(InputError, match=remedy):
            preflight(Needs(run=str(tmp_path / "run")))


def test_no_password_of_the_endpoint_is_shown(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://me:pa/ss@host:1")
    ((text, _),) = endpoint(Needs())
    assert text == "S3 endpoint: http://...@host:1"
