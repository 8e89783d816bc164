"""Both ends of a migration in one event loop, to be looked at and cut from within."""

import asyncio

from pageferry.pipeline import api


class BothEnds:
    """Whoever inherits this sets `listening` (a Destination) and `source` (a Source)."""

    async def __aenter__(self):
        self.arriving = asyncio.ensure_future(api.receive_one(self.listening))
        self.sending = asyncio.ensure_future(self.source.run())
        return self

    async def __aexit__(self, *rest):
        for task in (self.sending, self.arriving):
            if not task.done():
                task.cancel()
        await asyncio.gather(self.sending, self.arriving, return_exceptions=True)
        self.listening.close()
