"""The coordinator of one worker process: what it says and of what it dies."""

import asyncio

from pageferry.workers.pool import Pool


class Coordinator:
    """One worker and what it says."""

    def __init__(self, counters):
        self.said = asyncio.Queue()
        self.failed = asyncio.get_running_loop().create_future()
        self.pool = Pool("test", counters, lambda w, job: self.said.put_nowait(job), self._fail)

    def _fail(self, error):
        if not self.failed.done():
            self.failed.set_result(error)

    async def hear(self, kind):
        job = await asyncio.wait_for(self.said.get(), 20)
        assert isinstance(job, kind)
        return job

    async def failure(self, kind):
        error = await asyncio.wait_for(self.failed, 20)
        assert isinstance(error, kind), error
        return error

    def say(self, job):
        self.pool.workers[0].say(job)
