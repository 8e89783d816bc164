"""Destination guests that misbehave at the worst moment."""

import os
import signal
import threading

from pageferry.transport.errors import DestinationError
from pageferry.workers.guests.demo import DemoDestination


class FailsToRun(DemoDestination):
    """Says at the last moment that it cannot run."""

    def run(self):
        raise DestinationError("the power supply is on fire")


class NeverConfirms(DemoDestination):
    """Starts, and its host is never heard of again (until `release`)."""

    def __init__(self, uri):
        super().__init__(uri)
        self.running = threading.Event()
        self.release = threading.Event()

    def run(self):
        where = super().run()
        self.running.set()
        self.release.wait(60)
        return where


class BreaksTheState(DemoDestination):
    """Cannot load the device state."""

    def load_state(self, kind, state, running):
        super().load_state(kind, state[:-3], running)


class HangsAtTheStart(DemoDestination):
    """Its process stands still when it is to run."""

    def run(self):
        os.kill(self._guest.process.pid, signal.SIGSTOP)
        return super().run()


class SetBackLate(DemoDestination):
    """Runs; what was set on its host for the move is not set back until `release`."""

    def __init__(self, uri):
        super().__init__(uri)
        self.release = threading.Event()
        self.yanked = False

    def started(self):
        self.release.wait(60)
        super().started()

    def yank(self):
        self.yanked = True
        super().yank()
