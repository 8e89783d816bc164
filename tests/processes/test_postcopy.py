"""The two processes of a postcopy by themselves: the one that answers page faults, with the test as
the destination, and the one that asks for pages, with the test as the source and as the guest."""

import asyncio
import os
import random
import select
from multiprocessing.connection import Connection

import numpy as np
import pytest
from armed_guest import ArmedGuest, all_pages, touched
from coordinator import Coordinator
from helpers import PAGE, until_async
from urgent_peer import UrgentPeer

from pageferry.transport.errors import HostLacks, PeerLost, RemoteProtocolError, VerificationFailed
from pageferry.transport.links import parse_endpoint
from pageferry.transport.messages import Block
from pageferry.transport.pages import NO_RUNS
from pageferry.transport.snapshot_format import CHUNK_BYTES, StoredBlock, digest
from pageferry.transport.urgent import (
    Answering,
    Elsewhere,
    Kind,
    Page,
    Placed,
    Request,
    Requesting,
    decode,
    encode,
)
from pageferry.transport.urgent_links import urgent_link
from pageferry.workers import fault, jobs, postcopy
from pageferry.workers.counters import Counters
from pageferry.workers.forking import context
from pageferry.workers.latency import Latency, report
from pageferry.workers.page_table import CLEAN, DIRTY, IN_FLIGHT, PageTable
from pageferry.workers.placing import FramePlacer, GuestPlacer
from pageferry.workers.postcopy import ROUTED
from pageferry.workers.preemption import Preemption, Reader, page_key
from pageferry.workers.ram import RamBlock, RamFile
from pageferry.workers.received import Received, Waiting
from pageferry.workers.snapshot_file import CheckedBlock

PAGES = 16
ZERO_PAGE = 3
TOKEN, OTHER_TOKEN = b"0123456789abcdef", b"fedcba9876543210"
LINKS = [(direct, scheme) for direct in (False, True) for scheme in ("ipc", "tcp")]

each_link = pytest.mark.parametrize(
    ("direct", "scheme"), LINKS, ids=[f"{'direct' if d else 'zmq'}-{s}" for d, s in LINKS]
)
each_kind = pytest.mark.parametrize("direct", [False, True], ids=["zmq", "direct"])


def address(tmp_path, scheme="ipc"):
    return f"ipc://{tmp_path}/u" if scheme == "ipc" else "tcp://127.0.0.1:0"


def memory_of_a_guest():
    """Random pages and a zero one."""
    content = bytearray(random.Random(7).randbytes(PAGES * PAGE))
    content[ZERO_PAGE * PAGE : (ZERO_PAGE + 1) * PAGE] = bytes(PAGE)
    return bytes(content)


CONTENT = memory_of_a_guest()


def content_of(page, count=1):
    return CONTENT[page * PAGE : (page + count) * PAGE]


async def counted(counters, **fields):
    """A process's numbers, once these are such: they may come a little after the deed."""
    await until_async(
        lambda: fields.items() <= counters.read(0).items(), f"these numbers: {fields}"
    )
    return counters.read(0)


# ---- the postcopy process, with the test as the destination ----------------------------------


class AtTheSource:
    """The process and all that it shares with others."""

    def __init__(self, host, route):
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.write(fd, CONTENT)
        self.file = RamFile(fd, "guest")
        self.block = RamBlock(Block("ram", PAGES * PAGE, host * PAGE), self.file, 0)
        self.counters, self.table = Counters(1), PageTable([PAGES], context().Lock())
        self.table.mark_dirty(0, all_pages(PAGES))
        self.preemption = Preemption(8, 1 << 20)
        self.route = [Connection(fd) for fd in os.pipe2(os.O_CLOEXEC)] if route else []
        self.coordinator = Coordinator(self.counters)

    def job(self, direct):
        route = self.route[1] if self.route else None
        return postcopy.PostcopyJob(
            [self.block], self.table, self.counters, self.preemption, route, direct
        )

    def states(self):
        return self.table.view(0).tolist()

    async def close(self):
        await self.coordinator.pool.close()
        for part in (self.file, self.counters, self.table, self.preemption, *self.route):
            part.close()


def with_postcopy(tmp_path, body, *, direct=False, scheme="ipc", host=1, route=False):
    """Run `body(source, destination)` with a postcopy process that has been told to connect."""

    async def run():
        source = AtTheSource(host, route)
        destination = UrgentPeer(urgent_link(direct, 0), Requesting())
        try:
            await source.coordinator.pool.start(postcopy.main, [source.job(direct)])
            await source.coordinator.hear(jobs.Ready)
            where = parse_endpoint(address(tmp_path, scheme))
            endpoint = destination.link.listen(where, TOKEN)
            source.coordinator.say(jobs.Open(str(endpoint), TOKEN))
            await body(source, destination)
        finally:
            destination.link.close()
            await source.close()

    asyncio.run(run())


async def ask(destination, page, block=0, **more):
    """Ask for a page; the answer."""
    await destination.send(destination.session.ask(block, page, page, **more))
    return await destination.event()


@each_link
def test_a_page_that_is_asked_for(tmp_path, direct, scheme):
    """It comes with its content, is in flight until it is placed and clean from then on; the others
    are nobody's, and senders are let go when nothing is open."""

    async def body(source, destination):
        page = await ask(destination, 5)
        assert isinstance(page, Page)
        assert (page.block, page.page, bytes(page.content)) == (0, 5, content_of(5))
        zero = await ask(destination, ZERO_PAGE)
        assert isinstance(zero, Page) and bytes(zero.content) == b""
        assert [p for p, s in enumerate(source.states()) if s == IN_FLIGHT] == [ZERO_PAGE, 5]
        destination.session.placed(page.number)
        destination.session.placed(zero.number)
        await destination.send(destination.session.report())
        source.coordinator.say(jobs.Finish())
        await source.coordinator.hear(jobs.Ready)
        assert [p for p, s in enumerate(source.states()) if s == CLEAN] == [ZERO_PAGE, 5]
        assert source.states().count(DIRTY) == PAGES - 2
        numbers = await counted(source.counters, requests=2, frames=2)
        assert (numbers["elsewhere"], numbers["resent"]) == (0, 0)
        assert (numbers["normal"], numbers["duplicate"]) == (1, 1)
        assert not Reader(source.preemption).request_open

    with_postcopy(tmp_path, body, direct=direct, scheme=scheme)


@each_kind
def test_a_page_that_a_sender_has(tmp_path, direct):
    """It stays on the sender's channel; the sender is told that somebody waits for it."""

    async def body(source, destination):
        assert source.table.claim(0, 4, 2, 2).tolist() == [4, 5]
        source.table.view(0)[5] = CLEAN  # acknowledged
        for page in (4, 5):
            assert await ask(destination, page) == Elsewhere(page, 0, page)
            assert Reader(source.preemption).in_front(page_key(0, page))
        assert source.states()[4:6] == [IN_FLIGHT, CLEAN]
        assert (await counted(source.counters, elsewhere=2))["frames"] == 0
        source.coordinator.say(jobs.Finish())
        await source.coordinator.hear(jobs.Ready)  # none of these is its own to wait for

    with_postcopy(tmp_path, body, direct=direct)


@each_kind
def test_what_the_postcopy_process_claimed_no_sender_gets(tmp_path, direct):
    async def body(source, destination):
        for page in (0, 7):
            await ask(destination, page)
        claimed = source.table.claim(0, 0, PAGES, PAGES).tolist()
        assert claimed == [page for page in range(PAGES) if page not in (0, 7)]

    with_postcopy(tmp_path, body, direct=direct)


@each_kind
def test_a_page_that_is_asked_for_again(tmp_path, direct):
    """Its first answer was lost: it comes again, and only the second one is waited for."""

    async def body(source, destination):
        await destination.send(destination.session.ask(0, 6, "a"))
        await destination.message()  # lost
        await destination.send(destination.session.ask(0, 6, "a", instead=0))
        page = await destination.event()
        assert (page.number, bytes(page.content)) == (1, content_of(6))
        assert (await counted(source.counters, resent=1, requests=2))["normal"] == 1
        assert source.states()[6] == IN_FLIGHT
        destination.session.placed(1)
        await destination.send(destination.session.report())
        source.coordinator.say(jobs.Finish())
        await source.coordinator.hear(jobs.Ready)
        assert source.states()[6] == CLEAN
        # it has been delivered: whoever asks now has missed the news
        assert isinstance(await ask(destination, 6), Elsewhere)

    with_postcopy(tmp_path, body, direct=direct)


@each_kind
def test_it_is_finished_when_all_is_placed(tmp_path, direct):
    """And not before, however often others ask in between."""

    async def body(source, destination):
        page = await ask(destination, 1)
        source.coordinator.say(jobs.Finish())
        for other in (1, 2):
            await ask(destination, 8 + other)
            await destination.send(destination.session.report())
        assert await ask(destination, 12)  # all that was said before was heard
        assert source.coordinator.said.empty()
        for number in (page.number, 1, 2, 3):
            destination.session.placed(number)
        await destination.send(destination.session.report())
        await source.coordinator.hear(jobs.Ready)
        assert source.states().count(CLEAN) == 4

    with_postcopy(tmp_path, body, direct=direct)


@each_kind
@pytest.mark.parametrize("page", [0, 4, 12])
def test_host_pages_come_whole(tmp_path, direct, page):
    """All their pages in one answer, all claimed at once."""

    async def body(source, destination):
        answer = await ask(destination, page)
        assert bytes(answer.content) == content_of(page, 4)
        states = [IN_FLIGHT if page <= p < page + 4 else DIRTY for p in range(PAGES)]
        assert source.states() == states
        destination.session.placed(answer.number)
        await destination.send(destination.session.report())
        source.coordinator.say(jobs.Finish())
        await source.coordinator.hear(jobs.Ready)
        assert source.states() == [CLEAN if s == IN_FLIGHT else s for s in states]
        await counted(source.counters, normal=4)

    with_postcopy(tmp_path, body, direct=direct, host=4)


@each_kind
@pytest.mark.parametrize(
    ("block", "page", "host"),
    [(1, 0, 1), (65534, 0, 1), (0, PAGES, 1), (0, 1 << 40, 1), (0, 2, 4), (0, PAGES, 4)],
)
def test_a_request_outside_of_memory_ends_it(tmp_path, direct, block, page, host):
    """Or in the middle of a host page. Nothing was claimed for it."""

    async def body(source, destination):
        await destination.send(destination.session.ask(block, page, "a"))
        await source.coordinator.failure(RemoteProtocolError)
        assert source.states() == [DIRTY] * PAGES
        assert not Reader(source.preemption).request_open

    with_postcopy(tmp_path, body, direct=direct, host=host)


@each_kind
def test_what_only_a_source_says_ends_it(tmp_path, direct):
    async def body(source, destination):
        await destination.send(encode(Kind.ZERO, 0, 0, 0, 1))
        await source.coordinator.failure(RemoteProtocolError)

    with_postcopy(tmp_path, body, direct=direct)


@each_kind
def test_a_damaged_request_counts_as_lost(tmp_path, direct):
    """The next one is answered as ever."""

    async def body(source, destination):
        data = bytearray(destination.session.ask(0, 5, "a"))
        data[9] ^= 1
        await destination.send(bytes(data))
        await destination.send(b"short")
        page = await ask(destination, 5, instead=0)
        assert bytes(page.content) == content_of(5)
        await counted(source.counters, requests=1)

    with_postcopy(tmp_path, body, direct=direct)


def test_a_direct_connection_that_breaks_ends_it(tmp_path):
    """It does not come back: the migration pauses."""

    async def body(source, destination):
        await ask(destination, 5)
        destination.link.close()
        error = await source.coordinator.failure(PeerLost)
        assert "urgent" in error.message
        assert not Reader(source.preemption).request_open

    with_postcopy(tmp_path, body, direct=True)


def test_nobody_is_where_it_is_told_to_connect(tmp_path):
    """A direct connection says so, and is told to the coordinator."""

    async def run():
        source = AtTheSource(1, route=False)
        try:
            await source.coordinator.pool.start(postcopy.main, [source.job(True)])
            await source.coordinator.hear(jobs.Ready)
            source.coordinator.say(jobs.Open(f"ipc://{tmp_path}/nobody", TOKEN))
            error = await asyncio.wait_for(source.coordinator.failed, 20)
            assert type(error).__name__ == "ConnectError"
        finally:
            await source.close()

    asyncio.run(run())


@each_kind
def test_without_preemption_requests_go_to_the_senders(tmp_path, direct):
    """It claims and sends nothing itself, and holds up nobody."""

    async def body(source, destination):
        for page in (5, 9):
            assert await ask(destination, page) == Elsewhere(page, 0, page)
            data = os.read(source.route[0].fileno(), 100)
            assert ROUTED.unpack(data) == (0, page)
        assert source.states() == [DIRTY] * PAGES
        await counted(source.counters, requests=2)

    with_postcopy(tmp_path, body, direct=direct, route=True)


# ---- the fault process, with the test as the source and as the guest -------------------------


class AtTheDestination:
    """The process, the guest that it serves, and all that it shares with others."""

    def __init__(self, guest, listen, direct, there):
        self.guest, self.listen, self.direct = guest, listen, direct
        self.received, self.waiting = Received([guest.pages]), Waiting()
        self.counters, self.latency = Counters(2), Latency()
        missing = [page for page in range(guest.pages) if page not in there]
        self.received.expect(0, (np.array(missing), np.ones(len(missing), np.int64)))
        self.arrivals, self.tell = (Connection(fd) for fd in os.pipe2(os.O_CLOEXEC))
        self.coordinator = Coordinator(self.counters)
        self.here = ()  # blocks of a snapshot

    def job(self):
        return fault.FaultJob(
            [self.guest.block], self.guest.memory, self.received, self.waiting, self.arrivals,
            self.latency, self.counters, self.listen, TOKEN, self.direct, here=self.here,
        )  # fmt: skip

    async def listening(self):
        """Where it listens, once it does."""
        ready = await self.coordinator.hear(jobs.Ready)
        where = parse_endpoint(self.listen)
        return where if where.scheme == "ipc" else where.sibling(ready.endpoint)

    def waits(self):
        return self.latency.numbers()

    def comes_by_a_receiver(self, page, content):
        """What a receiver does with a frame."""
        placer = GuestPlacer(self.guest.memory, self.received, self.counters.row(1))
        frames = FramePlacer([self.guest.block], placer, self.waiting, self.tell.fileno())
        runs = (np.array([page]), np.array([1]))
        frames.place(0, runs, content)
        frames.tell_arrivals(0, (runs, NO_RUNS, NO_RUNS))

    async def woken(self, thread):
        await asyncio.to_thread(thread.join, 20)
        assert not thread.is_alive(), "nobody wakes it"

    async def waited(self, count):
        """Until so many waits are over."""
        await until_async(
            lambda: sum(report(self.waits()).get("postcopy-latency-dist", ())) == count,
            f"{count} waits",
        )

    async def close(self):
        await self.coordinator.pool.close()
        for part in (self.received, self.waiting, self.counters, self.latency):
            part.close()
        self.arrivals.close()
        self.tell.close()


def with_faults(
    tmp_path, body, *, direct=False, scheme="ipc", there=(), host=1, pages=PAGES, dial=True,
    here=(),
):  # fmt: skip
    """Run `body(destination, source)` with a fault process to which the test has connected."""
    try:
        guest = ArmedGuest([pages], page_size=host * PAGE)
    except HostLacks as e:
        pytest.skip(str(e))

    async def run():
        destination = AtTheDestination(guest, address(tmp_path, scheme), direct, there)
        destination.here = here
        source = UrgentPeer(urgent_link(direct, 0), Answering())
        try:
            await destination.coordinator.pool.start(fault.main, [destination.job()])
            source.endpoint = await destination.listening()
            if dial:
                source.link.dial(source.endpoint, TOKEN)
            await body(destination, source)
        finally:
            source.link.close()
            await destination.close()

    try:
        asyncio.run(run())
    finally:
        guest.close()


async def answer(source, request, content):
    await source.send(source.session.page(request, request.page, content, 1000))


async def settled(source, *tokens):
    """Until what was sent with these tokens is reported as placed."""
    left = set(tokens)
    while left:
        left -= set((await source.event_of(Placed)).tokens)


@each_link
@pytest.mark.parametrize("content", [content_of(5), b""], ids=["content", "zeros"])
def test_a_fault_is_asked_for_and_the_answer_wakes(tmp_path, direct, scheme, content):
    """With what was sent under the write that slept; it is reported, and its wait counted."""

    async def body(destination, source):
        sleeper = destination.guest.touch(5)
        request = await source.event_of(Request)
        assert (request.block, request.page) == (0, 5)
        assert sleeper.is_alive() and destination.guest.there() == []
        assert destination.waiting.words().tolist().count(0) == 1023
        await answer(source, request, content)
        await destination.woken(sleeper)
        assert destination.guest.page(5) == touched(content or bytes(PAGE))
        await settled(source, 5)
        assert source.session.idle
        assert destination.guest.there() == [5]
        assert np.flatnonzero(destination.received.view(0)).tolist() == [5]
        await destination.waited(1)
        assert not destination.waiting.words().any()
        numbers = await counted(destination.counters, answered=1)
        assert numbers["requests"] == 1
        assert (numbers["normal"], numbers["duplicate"]) == ((1, 0) if content else (0, 1))
        assert numbers["held_ns"] == 1000

    with_faults(tmp_path, body, direct=direct, scheme=scheme)


@each_kind
def test_a_fault_on_a_page_that_is_known_to_be_zero(tmp_path, direct):
    """A hole of the source: answered here, nobody is asked."""

    async def body(destination, source):
        sleeper = destination.guest.touch(4)
        await destination.woken(sleeper)
        assert destination.guest.page(4) == touched(bytes(PAGE))
        await counted(destination.counters, local_zero=1)
        sleeper = destination.guest.touch(5)
        request = await source.event_of(Request)
        assert request.page == 5
        await answer(source, request, content_of(5))
        await destination.woken(sleeper)

    with_faults(tmp_path, body, direct=direct, there=[3, 4])


@each_kind
def test_a_page_that_several_threads_wait_for_is_asked_for_once(tmp_path, direct):
    async def body(destination, source):
        first = destination.guest.touch(5)
        request = await source.event_of(Request)
        second = destination.guest.touch(5)
        await counted(destination.counters, repeated=1)
        await answer(source, request, content_of(5))
        await destination.woken(first)
        await destination.woken(second)
        await settled(source, 5)
        await destination.waited(1)
        assert (await counted(destination.counters, answered=1))["requests"] == 1

    with_faults(tmp_path, body, direct=direct)


@each_kind
@pytest.mark.parametrize("early", [False, True])
def test_a_page_that_comes_by_a_receiver(tmp_path, direct, early):
    """Before the source says so, or after: the wait is over either way."""

    async def body(destination, source):
        sleeper = destination.guest.touch(5)
        request = await source.event_of(Request)
        if early:
            destination.comes_by_a_receiver(5, content_of(5))
            await destination.woken(sleeper)
        await source.send(source.session.elsewhere(request))
        await counted(destination.counters, elsewhere=1)
        if not early:
            assert sleeper.is_alive()
            destination.comes_by_a_receiver(5, content_of(5))
            await destination.woken(sleeper)
        await destination.waited(1)
        assert destination.guest.page(5) == touched(content_of(5))
        assert not destination.waiting.words().any()

    with_faults(tmp_path, body, direct=direct)


@each_kind
def test_an_answer_that_stays_away_is_asked_for_again(tmp_path, direct):
    """Under a new number; the first answer may still come, and is the one that wakes."""

    async def body(destination, source):
        sleeper = destination.guest.touch(5)
        first = await source.event_of(Request)
        second = await source.event_of(Request)
        assert second.number > first.number and second.page == 5
        await answer(source, first, content_of(5))
        await destination.woken(sleeper)
        source.session.forget(first.number)
        await answer(source, second, content_of(6))  # too late: the kernel keeps the first
        await settled(source, 5)
        assert source.session.idle
        assert destination.guest.page(5) == touched(content_of(5))
        numbers = await counted(destination.counters, answered=2)
        assert numbers["requests"] == 1 and numbers["asked_again"] >= 1
        assert numbers["already_there"] == 0  # it was not tried
        await destination.waited(1)

    with_faults(tmp_path, body, direct=direct)


@each_kind
def test_a_report_that_was_lost_is_made_good(tmp_path, direct):
    """Also when another request is never answered, because its page came by a receiver."""

    async def body(destination, source):
        sleeper = destination.guest.touch(5)
        await source.event_of(Request)  # what answers it is lost
        destination.comes_by_a_receiver(5, content_of(5))
        await destination.woken(sleeper)
        await destination.waited(1)
        sleeper = destination.guest.touch(6)
        await answer(source, await source.event_of(Request), content_of(6))
        await destination.woken(sleeper)
        await counted(destination.counters, answered=1)
        while not decode(await source.message()).count:
            pass  # the report that names it is lost, like those before
        for _ in range(4):
            await source.event()
            if source.session.idle:
                break
        assert source.session.idle

    with_faults(tmp_path, body, direct=direct)


@each_kind
def test_who_does_not_know_the_token_is_not_heard(tmp_path, direct):
    """He could put into the guest what he likes."""

    async def body(destination, source):
        stranger = UrgentPeer(urgent_link(direct, 0), Answering())
        try:
            stranger.link.dial(source.endpoint, OTHER_TOKEN)
            sleeper = destination.guest.touch(5)
            stranger.link.send(encode(Kind.ZERO, 0, 0, 5, 1))
            source.link.dial(source.endpoint, TOKEN)
            request = await source.event_of(Request)
            assert request.page == 5
            assert sleeper.is_alive()
            assert stranger.link.receive() is None
            await answer(source, request, content_of(5))
            await destination.woken(sleeper)
            assert destination.guest.page(5) == touched(content_of(5))
        finally:
            stranger.link.close()

    with_faults(tmp_path, body, direct=direct, dial=False)


@each_kind
@pytest.mark.parametrize(
    "wrong",
    [
        lambda number: encode(Kind.ZERO, number + 7, 0, 5, 1),
        lambda number: encode(Kind.ZERO, number, 0, 6, 1),
        lambda number: encode(Kind.REQUEST, number, 0, 5),
        lambda number: encode(Kind.PAGE, number, 0, 5, 2, 0, bytes(2 * PAGE)),
    ],
    ids=["no such number", "another page", "a request", "another size"],
)
def test_an_answer_that_makes_no_sense_ends_it(tmp_path, direct, wrong):
    """Nothing of it is installed."""

    async def body(destination, source):
        destination.guest.touch(5)
        request = await source.event_of(Request)
        await source.send(wrong(request.number))
        await destination.coordinator.failure(RemoteProtocolError)
        assert destination.guest.there() == []

    with_faults(tmp_path, body, direct=direct)


@each_kind
def test_a_damaged_answer_counts_as_lost(tmp_path, direct):
    """It is asked for again."""

    async def body(destination, source):
        sleeper = destination.guest.touch(5)
        request = await source.event_of(Request)
        data = bytearray(encode(Kind.PAGE, request.number, 0, 5, 1, 0, content_of(5)))
        data[-1] ^= 1
        await source.send(bytes(data))
        again = await source.event_of(Request)
        assert again.number > request.number and again.page == 5
        assert sleeper.is_alive() and destination.guest.there() == []
        await answer(source, again, content_of(5))
        await destination.woken(sleeper)

    with_faults(tmp_path, body, direct=direct)


@each_link
def test_what_was_asked_for_is_asked_for_again_on_a_new_link(tmp_path, direct, scheme):
    """While the source is gone, faults are kept; who knows only the old token is a stranger."""

    async def body(destination, source):
        sleepers = [destination.guest.touch(5)]
        await source.event_of(Request)
        source.link.close()
        if direct:
            await destination.coordinator.hear(jobs.Unlink)  # it says that the link broke
        else:
            destination.coordinator.say(jobs.Unlink())
        sleepers.append(destination.guest.touch(6))
        words = destination.waiting.words()
        await until_async(lambda: np.count_nonzero(words) == 2, "the second fault")
        destination.coordinator.say(jobs.Relink(OTHER_TOKEN))
        endpoint = await destination.listening()
        again = UrgentPeer(urgent_link(direct, 0), Answering())
        old = urgent_link(direct, 0)
        try:
            old.dial(endpoint, TOKEN)
            again.link.dial(endpoint, OTHER_TOKEN)
            requests = [await again.event_of(Request) for _ in sleepers]
            assert {request.page for request in requests} == {5, 6}
            for request in requests:
                await answer(again, request, content_of(request.page))
            for sleeper in sleepers:
                await destination.woken(sleeper)
            await settled(again, 5, 6)
            assert old.receive() is None
            await destination.waited(2)
        finally:
            again.link.close()
            old.close()

    with_faults(tmp_path, body, direct=direct, scheme=scheme)


@each_kind
def test_when_all_is_here_nothing_is_caught_any_more(tmp_path, direct):
    """What is still a hole reads as zero, and who sleeps on one wakes."""

    async def body(destination, source):
        sleeper = destination.guest.touch(5)
        await source.event_of(Request)
        destination.coordinator.say(jobs.Finish())
        await destination.coordinator.hear(jobs.Ready)
        await destination.woken(sleeper)
        await destination.woken(destination.guest.touch(6))
        assert destination.guest.there() == [5, 6]
        assert destination.guest.page(6) == touched(bytes(PAGE))
        destination.coordinator.say(jobs.Finish())
        await destination.coordinator.hear(jobs.Ready)

    with_faults(tmp_path, body, direct=direct)


@each_kind
def test_while_it_is_told_to_hold_nobody_is_answered(tmp_path, direct):
    """A page that is known to be zero, and is said to be missing before all is said: who touched it
    in between gets what comes."""

    async def body(destination, source):
        await hold(destination, True)
        sleeper = destination.guest.touch(4)
        await until_async(lambda: is_readable(destination.guest.uffd), "it sleeps")
        await hold(destination, True)  # it has been round once more, and read nothing
        assert is_readable(destination.guest.uffd)
        destination.received.expect(0, (np.array([4]), np.array([1])))
        await hold(destination, False)
        request = await source.event_of(Request)
        assert request.page == 4
        assert sleeper.is_alive() and destination.guest.there() == []
        await answer(source, request, content_of(4))
        await destination.woken(sleeper)
        assert destination.guest.page(4) == touched(content_of(4))
        assert (await counted(destination.counters, answered=1))["local_zero"] == 0

    with_faults(tmp_path, body, direct=direct, there=[3, 4])


async def hold(destination, on):
    """Tell it; wait until it has done so."""
    token = os.urandom(8)
    destination.coordinator.say(jobs.Hold(token, on))
    assert (await destination.coordinator.hear(jobs.Ready)).token == token


def is_readable(fd):
    return bool(select.select([fd], [], [], 0)[0])


@each_kind
def test_what_was_asked_for_before_it_holds_still_comes(tmp_path, direct):
    """Its answer, and what a receiver installs, need no reading of faults."""

    async def body(destination, source):
        sleepers = [destination.guest.touch(page) for page in (5, 6)]
        requests = {r.page: r for r in [await source.event_of(Request) for _ in sleepers]}
        await hold(destination, True)
        await answer(source, requests[5], content_of(5))
        destination.comes_by_a_receiver(6, content_of(6))
        for sleeper in sleepers:
            await destination.woken(sleeper)
        await destination.waited(2)
        assert destination.guest.page(5) == touched(content_of(5))

    with_faults(tmp_path, body, direct=direct)


@each_kind
def test_a_link_that_is_lost_while_it_holds(tmp_path, direct):
    """It holds on; what was touched meanwhile is asked for on the new link, and not before."""

    async def body(destination, source):
        await hold(destination, True)
        sleeper = destination.guest.touch(5)
        destination.coordinator.say(jobs.Relink(OTHER_TOKEN))
        endpoint = await destination.listening()
        await until_async(lambda: is_readable(destination.guest.uffd), "it sleeps")
        again = UrgentPeer(urgent_link(direct, 0), Answering())
        try:
            again.link.dial(endpoint, OTHER_TOKEN)
            await hold(destination, True)
            assert is_readable(destination.guest.uffd)
            await hold(destination, False)
            request = await again.event_of(Request)
            assert request.page == 5
            await answer(again, request, content_of(5))
            await destination.woken(sleeper)
        finally:
            again.link.close()

    with_faults(tmp_path, body, direct=direct)


@each_kind
def test_when_all_is_here_it_does_not_hold_any_more(tmp_path, direct):
    async def body(destination, source):
        await hold(destination, True)
        sleeper = destination.guest.touch(5)
        await until_async(lambda: is_readable(destination.guest.uffd), "it sleeps")
        destination.coordinator.say(jobs.Finish())
        await destination.coordinator.hear(jobs.Ready)
        await destination.woken(sleeper)
        assert destination.guest.page(5) == touched(bytes(PAGE))

    with_faults(tmp_path, body, direct=direct)


@each_kind
def test_a_fault_in_the_middle_of_a_host_page(tmp_path, direct):
    """The whole host page is asked for, installed and reported."""

    async def body(destination, source):
        sleeper = destination.guest.touch(6)
        request = await source.event_of(Request)
        assert request.page == 4
        await answer(source, request, content_of(4, 4))
        await destination.woken(sleeper)
        await settled(source, 4)
        assert destination.guest.there() == [4, 5, 6, 7]
        assert destination.guest.page(6) == touched(content_of(6))
        assert destination.guest.page(7) == content_of(7)
        assert np.flatnonzero(destination.received.view(0)).tolist() == [4, 5, 6, 7]

    with_faults(tmp_path, body, direct=direct, host=4)


def test_a_process_that_takes_over_from_one_that_died(tmp_path):
    """Who slept is told of once more: the new one wakes all, and they touch again."""

    async def body(destination, source):
        sleeper = destination.guest.touch(5)
        await source.event_of(Request)
        await destination.coordinator.pool.close()
        destination.coordinator = Coordinator(destination.counters)
        source.link.close()
        await destination.coordinator.pool.start(fault.main, [destination.job()])
        endpoint = await destination.listening()
        again = UrgentPeer(urgent_link(True, 0), Answering())
        try:
            again.link.dial(endpoint, TOKEN)
            request = await again.event_of(Request)
            assert request.page == 5
            await answer(again, request, content_of(5))
            await destination.woken(sleeper)
        finally:
            again.link.close()

    with_faults(tmp_path, body, direct=True)


# ---- where the memory is in a snapshot on this host -------------------------------------------

SAVED = random.Random(8).randbytes(40 * PAGE)


def saved(page, count=1):
    return SAVED[page * PAGE : (page + count) * PAGE]


@pytest.fixture
def snapshot():
    """A block of SAVED and its digests, as a snapshot has them."""
    file = RamFile(os.memfd_create("snapshot", os.MFD_CLOEXEC), "a")
    os.write(file.fd, SAVED)
    for at in range(0, len(SAVED), CHUNK_BYTES):
        os.write(file.fd, digest(SAVED[at : at + CHUNK_BYTES]))
    stored = StoredBlock(Block("ram", len(SAVED)), 0, len(SAVED))
    yield CheckedBlock(stored, file, here=True)
    file.close()


def test_a_fault_brings_its_chunk_and_leaves_alone_what_is_there(tmp_path, snapshot):
    """What a receiver has brought and the guest has written is not written again; nor is it after
    the guest gave it back. The last chunk is a partial one."""

    async def body(destination, source):
        guest = destination.guest
        destination.comes_by_a_receiver(18, saved(18))
        await destination.woken(guest.touch(18))
        await destination.woken(guest.touch(20))
        await counted(destination.counters, served_here=1, normal=15)
        assert guest.there() == list(range(16, 32))
        assert [guest.page(page) for page in (18, 20)] == [touched(saved(p)) for p in (18, 20)]
        assert b"".join(map(guest.page, range(21, 32))) == saved(21, 11)
        guest.block.clear((np.array([20]), np.array([1])))
        await destination.woken(guest.touch(20))
        assert guest.page(20) == touched(bytes(PAGE))
        await destination.woken(guest.touch(39))
        await counted(destination.counters, served_here=2, normal=23, requests=0, already_there=0)
        assert b"".join(map(guest.page, range(32, 39))) == saved(32, 7)
        assert np.flatnonzero(destination.received.view(0)).tolist() == list(range(16, 40))

    with_faults(tmp_path, body, pages=40, here=[snapshot])


@pytest.mark.parametrize("host", [4, 20])
def test_a_host_page_is_read_whole(tmp_path, snapshot, host):
    """Whether it is a part of a chunk or goes beyond it."""

    async def body(destination, source):
        await destination.woken(destination.guest.touch(23))
        await counted(destination.counters, served_here=1)
        there = list(range(16, 32)) if host == 4 else list(range(20, 40))
        assert destination.guest.there() == there
        there.remove(23)
        assert all(destination.guest.page(page) == saved(page) for page in there)

    with_faults(tmp_path, body, pages=40, host=host, here=[snapshot])


def test_of_a_damaged_chunk_nothing_is_installed(tmp_path, snapshot):
    async def body(destination, source):
        os.pwrite(snapshot.file.fd, b"other", 17 * PAGE)
        destination.guest.touch(20)
        await destination.coordinator.failure(VerificationFailed)
        assert destination.guest.there() == []

    with_faults(tmp_path, body, pages=40, here=[snapshot])
