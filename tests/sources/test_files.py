"""Files and folders that appear whole, and that go nowhere but where they are told."""

import os

import pytest

from hf_attnswap import UsageError
from hf_attnswap.sources.files import whole_file, whole_folder, write_whole
from hf_attnswap.sources.structured import read_object


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    theirs, report = tmp_path / "theirs", tmp_path / "report.json"
    theirs.write_text("keep")
    (tmp_path / f".report.json.{os.getpid()}.tmp").symlink_to(theirs)  # a name that could be foreseen
    write_whole(report, b"{}")
    assert theirs.read_text() == "keep" and report.read_bytes() == b"{}" and not report.is_symlink()
    monkeypatch.setattr("secrets.token_hex", lambda size: "known")
    for make in (whole_file, whole_folder):
        (tmp_path / ".new.known.tmp").symlink_to(theirs)
        with pytest.raises(FileExistsError), make(tmp_path / "new"):
            pass
        assert theirs.read_text() == "keep" and (tmp_path / ".new.known.tmp").is_symlink()
        (tmp_path / ".new.known.tmp").unlink()


def test_a_link_in_place_of_the_file_gives_way_to_the_file(tmp_path):
    (tmp_path / "theirs").write_text("keep")
    (tmp_path / "report.json").symlink_to(tmp_path / "theirs")
    write_whole(tmp_path / "report.json", b"{}")
    assert (tmp_path / "theirs").read_text() == "keep" and not (tmp_path / "report.json").is_symlink()


def test_what_fails_leaves_nothing(tmp_path):
    for make in (whole_file, whole_folder):
        with pytest.raises(ZeroDivisionError), make(tmp_path / "new"):
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", (b"{", b"[1]", b"null", b"\xff", b"[" * 100_000, b"9" * 5000))
def test_json_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match="config.json is damaged: "):
        read_object(tmp_path / "config.json")
