"""Many images into one directory, several at a time; one that was broken off goes on."""

import asyncio
import contextlib
import json
import os
import signal

import msgspec
import pytest
from helpers import Running, receiver, until
from helpers import pageferry as run
from twin_page import twin

import pageferry
from pageferry.pipeline import api
from pageferry.pipeline.destination import Destination
from pageferry.pipeline.parameters import Parameters
from pageferry.transport.errors import DestinationError, PeerRefused, VerificationFailed
from pageferry.transport.links import Endpoint
from pageferry.transport.messages import PROTOCOL, Block, Hello
from pageferry.transport.pages import PAGE_SIZE
from pageferry.workers.content import ContentIndex
from pageferry.workers.digest import CHUNK_PAGES
from pageferry.workers.guests import image_directory
from pageferry.workers.guests.image_directory import DirectoryDestination
from pageferry.workers.guests.uri import GuestUri

MIB = 1 << 20


@pytest.fixture
def images(tmp_path):
    """Makes images of random content; they are beside the directory that receives."""

    def make(name, size=8 * MIB):
        path = tmp_path / name
        path.write_bytes(os.urandom(size))
        return path

    (tmp_path / "into").mkdir()
    make.into = tmp_path / "into"
    return make


def hidden(directory):
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def sent(path, endpoint, *options):
    ran = run("send", f"image:{path}", endpoint, "--json", *options)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_several_at_a_time_each_by_its_name(images):
    sources = [images(f"vm{i}.mem") for i in range(5)]
    with (
        receiver("--into", f"image:{images.into}/", "--at-once", "2") as receiving,
        contextlib.ExitStack() as stack,
    ):
        running = [
            stack.enter_context(
                Running("send", f"image:{path}", receiving.endpoint, "--max-bandwidth", "200kB",
                        "--batch-pages", "16", "--monitor", f"unix:{path}.sock")
            )
            for path in sources[:2]
        ]  # fmt: skip
        for sending in running:
            sending.error_line("round 1")
        # a third is told that there is no room
        busy = run("send", f"image:{sources[2]}", receiving.endpoint)
        assert busy.returncode == 6
        assert "busy" in busy.stderr
        for path, sending in zip(sources, running, strict=False):
            assert run("set", f"unix:{path}.sock", "max-bandwidth=10Gbit").returncode == 0
            assert sending.finish()[0] == 0
        for path in sources[2:]:
            sent(path, receiving.endpoint)
        receiving.process.send_signal(signal.SIGINT)
        said = [json.loads(line) for line in receiving.finish()[1].splitlines()]
    for path in sources:
        assert (images.into / path.name).read_bytes() == path.read_bytes()
    assert not hidden(images.into)
    ended = [report for report in said if "name" in report and report["status"] == "completed"]
    assert sorted(report["name"] for report in ended) == sorted(path.name for path in sources)


@pytest.mark.parametrize("where", ["another image", "a chunk that was there"])
def test_what_somebody_made_to_be_taken_for_a_page(images, where):
    """What has a page's xxh3-128 and is another one gets into nobody else's image."""
    victim = images("victim", 2 * MIB)
    content = victim.read_bytes()
    made = twin(content[:PAGE_SIZE], b"planted!")
    planted = images("planted" if where == "another image" else "victim.before", 2 * MIB)
    planted.write_bytes(made + content[PAGE_SIZE:MIB] + os.urandom(MIB))
    name = "planted" if where == "another image" else "victim"
    with receiver("--into", f"image:{images.into}/") as receiving:
        sent(planted, receiving.endpoint, "--name", name)
        report = sent(victim, receiving.endpoint)
    assert (images.into / "victim").read_bytes() == content
    assert report["pages-already-there"] == 255


class ForgetsAPage(DirectoryDestination):
    """What is taken from another image does not all get into its file."""

    def held(self, block, pages, digests, sure):
        have = super().held(block, pages, digests, sure)
        spoiled = int(pages[have != 0][3])
        os.pwrite(self.blocks[block].file.fd, b"spoiled", spoiled * PAGE_SIZE)
        return have


@pytest.mark.parametrize("verify", [True, None])
def test_what_is_taken_from_another_image_is_read_back(images, verify):
    """With --verify; by default the file system is believed to hold what was written."""
    source, index = images("vm.mem", 2 * MIB), ContentIndex()
    endpoint = Endpoint("ipc", path=f"@test-read-back-{os.getpid()}")

    async def send(name, listening):
        arriving = asyncio.ensure_future(api.receive_one(listening))
        try:
            return await api.send(
                GuestUri("image", str(source)), listening.endpoint,
                Parameters(verify=verify), name=name,
            )  # fmt: skip
        finally:
            await asyncio.gather(arriving, return_exceptions=True)

    async def go():
        kinds = iter([DirectoryDestination, ForgetsAPage])
        listening = Destination(
            endpoint, lambda hello: next(kinds)(GuestUri("image", f"{images.into}/"), index)
        )
        try:
            await send("one", listening)
            return await send("two", listening)
        finally:
            listening.close()

    if verify:
        with pytest.raises(VerificationFailed, match="does not hold what was written"):
            asyncio.run(go())
        assert not (images.into / "two").exists()
    else:
        assert asyncio.run(go())["pages-already-there"] == 512


def test_a_name_steers_no_terminal(images):
    """It is the peer's choice, and what is printed of it is printable."""
    path = images("vm\x1b[31m.mem", 1 * MIB)
    with receiver("--into", f"image:{images.into}/") as receiving:
        ran = run("send", f"image:{path}", receiving.endpoint, "--quiet")
        line = receiving.error_line("vm")
        receiving.process.send_signal(signal.SIGINT)
        receiving.finish()
    assert "vm\ufffd[31m.mem: " in line, ran.stderr
    assert "\x1b" not in line


@pytest.mark.parametrize("who", ["source", "receiver"])
def test_one_that_is_killed_goes_on_from_what_is_there(images, who):
    source = images("vm.mem", 32 * MIB)
    part = images.into / ".vm.mem.pageferry-part"
    into = f"image:{images.into}/"

    def arrived():
        return part.exists() and part.stat().st_blocks * 512 >= 4 * MIB

    with receiver("--into", into) as receiving:
        with Running(
            "send", f"image:{source}", receiving.endpoint, "--max-bandwidth", "8MB"
        ) as sending:
            until(arrived, "some of it")
            (sending if who == "source" else receiving).process.kill()
            sending.process.wait()
        if who == "source":
            receiving.error_line("failed")
    assert hidden(images.into) == [part.name]
    assert not (images.into / "vm.mem").exists()
    with receiver("--into", into) as receiving:
        report = sent(source, receiving.endpoint)
    there = report["pages-already-there"]
    assert 0 < there < 32 * MIB // PAGE_SIZE
    assert report["ram"]["normal"] == 32 * MIB // PAGE_SIZE - there
    assert (images.into / "vm.mem").read_bytes() == source.read_bytes()
    assert not hidden(images.into)


def test_what_came_before_a_kill_is_counted_to_the_page_and_is_there_for_others(images):
    """Of an image that broke off all pages that came stay, in chunks that are not whole too; and
    when it is whole, its clones find all of it, not only what came last."""
    source = images("vm.mem")
    content = source.read_bytes()
    part = images.into / ".vm.mem.pageferry-part"
    with receiver("--into", f"image:{images.into}/") as receiving:
        # as a killed receiver or source leaves it: some pages of each chunk, not in order
        with open(part, "wb") as file:
            for page in range(0, len(content) // PAGE_SIZE, 3):
                file.seek(page * PAGE_SIZE)
                file.write(content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
            file.seek(0)
            file.write(content[: 2 * MIB])  # and two whole ones, which nobody asks for
        pages = len(content) // PAGE_SIZE
        before = len({*range(0, pages, 3), *range(2 * CHUNK_PAGES)})
        report = sent(source, receiving.endpoint)
        assert report["pages-already-there"] == before
        assert report["ram"]["normal"] == pages - before
        clone = source.with_name("clone.mem")
        clone.write_bytes(content[: 5 * MIB] + os.urandom(PAGE_SIZE) + content[5 * MIB :])
        report = sent(clone, receiving.endpoint, "--verify")
        assert report["ram"]["normal"] == 1
    for path in (source, clone):
        assert (images.into / path.name).read_bytes() == path.read_bytes()


def test_a_source_that_was_killed_is_back_at_once(images):
    """Its silence has not shown yet: the newcomer takes its place, although there is no other, and
    goes on from what it sent. One that is alive keeps its place."""
    source = images("vm.mem", 32 * MIB)
    part = images.into / ".vm.mem.pageferry-part"
    with receiver("--into", f"image:{images.into}/", "--at-once", "1") as receiving:
        slow = ("--max-bandwidth", "1MB", "--batch-pages", "16")
        with Running("send", f"image:{source}", receiving.endpoint, *slow) as sending:
            until(lambda: part.exists() and part.stat().st_blocks * 512 >= MIB, "some of it")
            busy = run("send", f"image:{source}", receiving.endpoint)
            assert busy.returncode == 6 and "being received already" in busy.stderr
            sending.process.kill()
            sending.process.wait()
        report = sent(source, receiving.endpoint)
        assert report["pages-already-there"] >= MIB // PAGE_SIZE
        first = receiving.error_line("failed")
        while "being received already" in first:
            first = receiving.error_line("failed")
        assert "one that sends the same has come" in first
    assert (images.into / "vm.mem").read_bytes() == source.read_bytes()


def test_of_an_image_that_is_there_only_what_differs_is_sent(images):
    source = images("vm.mem")
    with receiver("--into", f"image:{images.into}/") as receiving:
        sent(source, receiving.endpoint)
        assert sent(source, receiving.endpoint)["ram"]["normal"] == 0
        content = bytearray(source.read_bytes())
        content[3 * MIB + 17] ^= 1
        content[5 * MIB : 5 * MIB + 2 * PAGE_SIZE] = bytes(2 * PAGE_SIZE)
        source.write_bytes(content)
        report = sent(source, receiving.endpoint, "--verify")
        # six chunks are equal, and of the others all pages that the old one has
        assert report["pages-already-there"] == 8 * CHUNK_PAGES - 3
    assert (images.into / "vm.mem").read_bytes() == content


def test_holes_and_another_size(images):
    """What was there is cut, and what is a hole now reads as zero."""
    source = images("vm.mem")
    with receiver("--into", f"image:{images.into}/") as receiving:
        sent(source, receiving.endpoint)
        with open(source, "r+b") as file:
            file.truncate(2 * MIB)
            file.truncate(4 * MIB + 5)
        sent(source, receiving.endpoint, "--verify")
    assert (images.into / "vm.mem").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "name", ["../up", "a/b", ".hidden", "", "-x", "a\nb", "a\x1b[2J", "x" * 151, "..", "a b"]
)
def test_names_that_the_peer_may_not_choose(tmp_path, name):
    destination = DirectoryDestination(GuestUri("image", f"{tmp_path}/"))
    blocks = [Block("ram", PAGE_SIZE)]
    with pytest.raises(PeerRefused, match="no name for an image"):
        destination.lay_out(Hello(PROTOCOL, "", "", "image", blocks, 1, 16, name=name))
    destination.discard()
    assert not list(tmp_path.iterdir())


def test_one_name_one_writer(tmp_path):
    hello = Hello(PROTOCOL, "", "", "image", [Block("ram", PAGE_SIZE)], 1, 16, name="vm")
    first, second = (DirectoryDestination(GuestUri("image", f"{tmp_path}/")) for _ in range(2))
    first.lay_out(hello)
    with pytest.raises(PeerRefused, match="being received already"):
        second.lay_out(hello)
    second.discard()
    first.discard()
    third = DirectoryDestination(GuestUri("image", f"{tmp_path}/"))
    third.lay_out(hello)
    third.run()
    third.close()
    assert [path.name for path in tmp_path.iterdir()] == ["vm"]


def test_a_link_in_place_of_the_hidden_file_is_not_followed(tmp_path):
    (tmp_path / "into").mkdir()
    (tmp_path / "victim").write_bytes(b"as it was")
    (tmp_path / "into" / ".vm.pageferry-part").symlink_to(tmp_path / "victim")
    destination = DirectoryDestination(GuestUri("image", f"{tmp_path}/into/"))
    hello = Hello(PROTOCOL, "", "", "image", [Block("ram", PAGE_SIZE)], 1, 16, name="vm")
    with pytest.raises(DestinationError):
        destination.lay_out(hello)
    destination.discard()
    assert (tmp_path / "victim").read_bytes() == b"as it was"


def test_copy_into_a_directory(images):
    source = images("vm.mem")
    report = pageferry.migrate(f"image:{source}", f"image:{images.into}/")
    assert report["destination"] == f"image:{images.into}/vm.mem"
    assert (images.into / "vm.mem").read_bytes() == source.read_bytes()


def test_pages_that_another_image_has_travel_once(images):
    """A clone costs what is different in it; zero pages stay holes."""
    first = images("first.mem")
    content = bytearray(first.read_bytes())
    content[: 2 * MIB], content[3 * MIB : 4 * MIB] = content[4 * MIB : 6 * MIB], bytes(MIB)
    clone = first.with_name("clone.mem")
    clone.write_bytes(content[:-PAGE_SIZE] + os.urandom(PAGE_SIZE + 11))
    with receiver("--into", f"image:{images.into}/") as receiving:
        assert sent(first, receiving.endpoint)["pages-already-there"] == 0
        report = sent(clone, receiving.endpoint, "--verify")
        assert report["pages-already-there"] == 7 * MIB // PAGE_SIZE - 1
        assert report["ram"]["normal"] == 2
        # the first may be gone or changed: then what is not right there travels
        (images.into / "first.mem").unlink()
        with open(images.into / "clone.mem", "r+b") as file:
            file.write(b"changed behind its back")
        again = clone.with_name("again.mem")
        again.write_bytes(clone.read_bytes())
        report = sent(again, receiving.endpoint, "--verify")
        assert report["ram"]["normal"] == 3
    for path in (clone, again):
        assert (images.into / path.name).read_bytes()[100:] == path.read_bytes()[100:]
    assert (images.into / "again.mem").read_bytes() == again.read_bytes()
    assert (images.into / "again.mem").stat().st_blocks * 512 <= 7 * MIB + 2 * PAGE_SIZE


def test_who_is_in_a_hurry_waits_for_no_copy(tmp_path):
    """Of the image that is there: it may be large. The next attempt gets the file."""
    (tmp_path / "vm").write_bytes(os.urandom(MIB))
    hello = Hello(
        PROTOCOL, "0", "11111111-1111-1111-1111-111111111111", "image", [Block("ram", MIB)], 1, 1,
        name="vm",
    )  # fmt: skip
    hurried = DirectoryDestination(GuestUri("image", f"{tmp_path}/"))
    hurried.hurry()
    with pytest.raises(DestinationError, match="given up"):
        hurried.lay_out(hello)
    again = DirectoryDestination(GuestUri("image", f"{tmp_path}/"))
    again.lay_out(hello)
    again.close()


def test_what_is_announced_costs_no_digests(images, monkeypatch):
    """Of a part that is there, and of an image that is said to be larger than any: no look at
    terabytes of holes, and no message that is too large; all of it comes."""
    (images.into / ".vm.pageferry-part").write_bytes(b"something")
    hello = Hello(PROTOCOL, "1", "id", "image", [Block("ram", 8 * MIB)], 1, 256, name="vm")
    monkeypatch.setattr(image_directory, "MOST_COMPARED", 8 * MIB)
    for size, digests in ((8 * MIB, 8 * 16), (8 * MIB + 1, 0)):
        guest = DirectoryDestination(GuestUri("image", f"{images.into}/"))
        guest.lay_out(msgspec.structs.replace(hello, blocks=[Block("ram", size)], image_size=size))
        assert sum(map(len, guest.have)) == digests and guest.fresh == [False]
        guest.discard()
        guest.close()
