"""What is told of another library's error shows no password, and a full disk is not a crash."""

from pathlib import Path

import pytest

from naign.errors import exit_on_input_error, one_line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cannot reach\n https://me:se/cr@et@host:5000/api now", "cannot reach https://...@host:5000/api now"),
        ("x" * 99 + " postgresql+psycopg://me:secret@host/" + "y" * 290, "t/" + "y" * 290),  # cut within the address
        ("no https://host/api for me@host", "no https://host/api for me@host"),
        ("403, url='https://host/a?sig=secret&x=1', why?", "403, url='https://host/a?...', why?"),
    ],
)
def test_a_url_in_an_error_shows_no_credentials(text, said):
    shown = one_line(RuntimeError(text))
    assert shown.endswith(said) and "secret" not in shown and "cr@et" not in shown


def test_a_long_error_keeps_its_last_whole_words():
    shown = one_line(RuntimeError("first " + "word " * 100 + "last"), 40)
    assert shown == "... " + "word " * 6 + "last" and len(shown) <= 40


def test_a_full_disk_ends_a_program_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_input_error("naign"):
        Path("/dev/full").write_text("more")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.endswith("No space left on device: free some space, or name another folder by TMPDIR\n")


def test_another_error_of_the_system_is_a_crash(tmp_path):
    with pytest.raises(FileNotFoundError), exit_on_input_error("naign"):
        (tmp_path / "none").read_text()
