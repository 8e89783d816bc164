"""One end of an urgent channel, for tests that are the other end of a process."""

import asyncio
import select
import time

GIVE_UP = 20.0


class UrgentPeer:
    """A link and its session (Answering or Requesting)."""

    def __init__(self, link, session):
        self.link, self.session = link, session

    async def send(self, data):
        """Hand over; wait until the peer is there."""
        end = time.monotonic() + GIVE_UP
        while not self.link.send(data):
            # what waits for the peer to appear looks at the link
            assert self.link.receive() is None
            assert time.monotonic() < end, "the peer does not appear"
            await self._something()

    async def message(self):
        """The next message, as it came."""
        end = time.monotonic() + GIVE_UP
        while (data := self.link.receive()) is None:
            assert not self.link.broken, "the link broke"
            assert time.monotonic() < end, "the peer says nothing"
            await self._something()
        return data

    async def event(self):
        """The next message, as the session understands it."""
        return self.session.receive(await self.message())

    async def event_of(self, kind):
        """The next event of this kind; others in between are for the session only."""
        while not isinstance(event := await self.event(), kind):
            pass
        return event

    async def _something(self):
        """Wait until the link has something to say, or for a moment: its level is not kept."""
        await asyncio.to_thread(select.select, [self.link.fd], [], [], 0.02)
