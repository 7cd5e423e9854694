"""One process at a time in a folder."""

import os
import signal
import time

import pytest

from hf_attnswap import UsageError
from hf_attnswap.sources.files import require_empty
from hf_attnswap.sources.lock import LOCK, alone_in


def child_in(folder) -> int:
    """A process that has locked the folder, and waits."""
    child = os.fork()
    if not child:
        with alone_in(folder):
            time.sleep(60)
        os._exit(0)
    while not (folder / LOCK).is_file() or not (folder / LOCK).read_text():
        time.sleep(0.001)
    return child


def test_a_second_process_is_told_the_first_which_may_be_killed(tmp_path):
    """What the killed one leaves behind hinders nobody, and is removed."""
    folder = tmp_path / "out"
    child = child_in(folder)
    try:
        with pytest.raises(UsageError, match=rf"output folder '.*/out' is in use by process {child} on \S+: wait"):
            with alone_in(folder):
                pass
        require_empty(folder)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (folder / LOCK).is_file()
    require_empty(folder)
    with alone_in(folder):
        assert str(os.getpid()) in (folder / LOCK).read_text()
    assert list(folder.iterdir()) == []


def test_folders_that_were_made_for_nothing_go_again(tmp_path):
    with pytest.raises(UsageError), alone_in(tmp_path / "a" / "b"):
        raise UsageError
    assert list(tmp_path.iterdir()) == []
    with alone_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "c").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["c"]


def test_a_folder_that_cannot_be_locked_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_attnswap.sources.lock.fcntl", None)
    with alone_in(tmp_path):
        assert "no other process is kept out of" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / LOCK).symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match="cannot be written to: "), alone_in(tmp_path):
        pass
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("theirs")
    with pytest.raises(UsageError, match="out' is a file"), alone_in(tmp_path / "out"):
        pass
    with (
        pytest.raises(UsageError, match="out/more' cannot be written to: Not a directory"),
        alone_in(tmp_path / "out" / "more"),
    ):
        pass
