"""Files are written whole or not at all, and nothing that is no file is replaced."""

import errno
import os
import socket
import stat
import threading
import tty

import pytest

from lumina_kernels.output import check_output, replace


def write(content):
    return lambda file: file.write_bytes(content)


def read_in_background(path):
    found = []
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, found


def test_a_file_is_replaced_and_a_free_name_taken(tmp_path):
    path = tmp_path / "new" / "folder" / "a"
    check_output(path)
    assert not path.parent.exists()
    for content in (b"one", b"two"):
        replace(path, write(content))
        assert path.read_bytes() == content and os.listdir(path.parent) == ["a"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for content in (b"to a new name", b"to a file"):
        check_output(tmp_path / "link")
        replace(tmp_path / "link", write(content))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "file").read_bytes() == content


@pytest.mark.parametrize("linked", [False, True])
def test_a_fifo_stays_and_gets_the_bytes(tmp_path, linked):
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / "fifo"
    if linked:
        path = tmp_path / "link"
        path.symlink_to(tmp_path / "fifo")
    check_output(path)
    thread, found = read_in_background(tmp_path / "fifo")
    replace(path, write(b"x" * 100_000))  # more than a pipe holds
    thread.join(10)
    assert found == [b"x" * 100_000]
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert not list(tmp_path.glob(".*"))


def test_a_device_stays_and_gets_the_bytes(tmp_path):
    """A pseudo-terminal of our own, reached by a link."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    try:
        (tmp_path / "link").symlink_to(os.ttyname(theirs))
        check_output(tmp_path / "link")
        replace(tmp_path / "link", write(b"to the device"))
        assert os.read(ours, 100) == b"to the device"
        assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path) == ["link"]
        assert stat.S_ISCHR((tmp_path / "link").stat().st_mode)
    finally:
        os.close(ours)
        os.close(theirs)


def test_what_else_is_there_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for kind in ("folder", "socket"):
            path = tmp_path / kind
            for refuse in (check_output, lambda path: replace(path, write(b"x"))):
                with pytest.raises(ValueError) as error:
                    refuse(path)
                assert str(error.value) == f"{path} is a {kind}, it must be a file or a new name"
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "deeper" / "x"):
        with pytest.raises(NotADirectoryError):
            check_output(path)
    with pytest.raises(OSError, match="too long"):
        check_output(tmp_path / ("x" * 300))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "socket"]


def test_the_longest_name_is_written(tmp_path):
    path = tmp_path / ("x" * 255)
    replace(path, write(b"y"))
    assert path.read_bytes() == b"y"


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def half(file):
        file.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace(path, half)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
