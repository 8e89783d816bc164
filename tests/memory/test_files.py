"""Files that become whole at once or not at all."""

import os
import stat

import pytest

from pageferry.transport.errors import DestinationError, SourceError
from pageferry.workers.guests.files import NewFile, open_to_read


@pytest.fixture
def new():
    """Makes new files, discarded at the end if nobody did."""
    made = []

    def make(path, size=10):
        made.append(NewFile(str(path), size))
        return made[-1]

    yield make
    for file in made:
        file.discard()


def test_nothing_is_visible_until_it_is_published(tmp_path, new):
    """Then all of it is, and nothing else."""
    path = tmp_path / "vm.mem"
    file = new(path, 10)
    os.pwrite(file.fd, b"abc", 3)
    assert not path.exists()
    file.publish()
    assert path.read_bytes() == b"\0\0\0abc\0\0\0\0"
    file.discard()
    assert os.listdir(tmp_path) == ["vm.mem"]


def test_a_file_that_is_discarded_leaves_nothing(tmp_path, new):
    """Once or twice; it takes no descriptor along either."""
    file = new(tmp_path / "vm.mem", 1 << 30)
    os.pwrite(file.fd, b"abc", 0)
    fd = file.fd
    file.discard()
    file.discard()
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_existing_file_is_replaced_as_a_whole(tmp_path, new):
    """Until then it is what it was, for those who have it open as well."""
    path = tmp_path / "vm.mem"
    path.write_bytes(b"old and longer than the new one")
    with open(path, "rb") as before:
        file = new(path, 3)
        os.pwrite(file.fd, b"new", 0)
        assert path.read_bytes() == b"old and longer than the new one"
        file.publish()
        assert path.read_bytes() == b"new"
        assert before.read() == b"old and longer than the new one"
    assert os.listdir(tmp_path) == ["vm.mem"]


def test_a_discarded_file_leaves_an_existing_one_alone(tmp_path, new):
    """A migration that failed costs nobody his old image."""
    path = tmp_path / "vm.mem"
    path.write_bytes(b"old")
    file = new(path, 3)
    os.pwrite(file.fd, b"new", 0)
    file.discard()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["vm.mem"]


def test_a_link_is_followed(tmp_path, new):
    """As cp does: a link to the large disk still points there afterwards."""
    target, path = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"theirs")
    path.symlink_to(target)
    file = new(path, 1)
    file.publish()
    assert target.read_bytes() == b"\0"
    assert path.is_symlink()


def test_what_is_no_regular_file_is_never_replaced(tmp_path, new):
    """A device, a pipe, a socket: somebody else's, and no place for memory."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(DestinationError, match="no regular file"):
        new(path)
    assert stat.S_ISFIFO(os.stat(path).st_mode)


def test_guest_memory_is_nobody_elses(tmp_path, new):
    """Mode 0600, whatever the umask."""
    before = os.umask(0)
    try:
        file = new(tmp_path / "vm.mem")
        file.publish()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "vm.mem").st_mode) == 0o600


def test_a_path_that_is_relative_means_where_we_were(tmp_path, new, monkeypatch):
    """Not where somebody goes afterwards."""
    monkeypatch.chdir(tmp_path)
    file = new("vm.mem")
    monkeypatch.chdir("/")
    file.publish()
    assert (tmp_path / "vm.mem").exists()


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "😀" * 63])
def test_a_long_name_has_room_for_a_temporary_one(tmp_path, new, name):
    """255 bytes are what a directory takes."""
    new(tmp_path / name).publish()
    assert os.listdir(tmp_path) == [name]


def test_a_name_that_is_too_long(tmp_path, new):
    """Publishing fails as DestinationError; nothing is left once it is discarded."""
    file = new(tmp_path / ("x" * 256))
    with pytest.raises(DestinationError, match=r"cannot name .*too long"):
        file.publish()
    file.discard()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["no/such/folder/vm.mem", "file/vm.mem", "folder"])
def test_places_where_no_file_can_be(tmp_path, new, where):
    """DestinationError at once, and nothing left behind."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    path = tmp_path / where
    with pytest.raises(DestinationError, match="cannot") as caught:
        new(path).publish()
    assert where in caught.value.message
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []


def test_a_folder_that_takes_the_name_meanwhile(tmp_path, new):
    """Publishing fails as DestinationError; nothing is left once it is discarded."""
    path = tmp_path / "vm.mem"
    file = new(path)
    path.mkdir()
    with pytest.raises(DestinationError, match="cannot replace"):
        file.publish()
    file.discard()
    assert os.listdir(tmp_path) == ["vm.mem"] and path.is_dir()


def test_a_folder_that_is_gone_meanwhile(tmp_path, new):
    """Publishing fails as DestinationError as well."""
    folder = tmp_path / "folder"
    folder.mkdir()
    file = new(folder / "vm.mem")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(DestinationError, match="cannot name"):
        file.publish()
    file.discard()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_file_to_read(tmp_path):
    """Its descriptor and its size."""
    path = tmp_path / "vm.mem"
    path.write_bytes(b"abc")
    fd, size = open_to_read(str(path), "memory image")
    try:
        assert size == 3 and os.read(fd, 10) == b"abc"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "cannot open the memory image .*missing: No such file"),
        ("folder", "cannot read the memory image .*folder: it is no regular file"),
        ("pipe", "it is no regular file"),
        ("empty", "it is empty"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, why):
    """SourceError that says why; a pipe without a writer does not make us wait."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    with (
        open(os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)),
        pytest.raises(SourceError, match=why),
    ):
        open_to_read(str(tmp_path / name), "memory image")
