"""Both ends of a migration without anything beneath: sessions, the source's core, guests that are a
flag. What the coordinators do with them is said here once more, as short as it gets; `say` is the
wire, which may lose what it is given."""

from collections import deque

from pageferry.pipeline import migration as core
from pageferry.pipeline.convergence import Convergence
from pageferry.pipeline.state import FINAL
from pageferry.transport import messages
from pageferry.transport.errors import PageferryError, PeerLost, RemoteProtocolError
from pageferry.transport.messages import Block, decode
from pageferry.transport.session import Role, Session

HELLO = messages.Hello(1, "0", "id", "demo", [Block("ram", 4096)], 1, 128)
ANSWERS = {
    messages.Welcome: core.ChannelsReady(),
    messages.Digests: core.Verified(),
    messages.Discarded: core.MissingTold(),
    messages.StateLoaded: core.StateLoaded(),
    messages.Running: core.Confirmed(),
    messages.Ended: core.PostcopyEnded(),
    messages.Resumed: core.Reconnected(1),
}


class SourceEnd:
    """The source. `pages`: how many are dirty, each time somebody looks, until it is still."""

    def __init__(self, say, *, verify=True, postcopy="never", pages=3):
        self.say, self.pages = say, pages
        convergence = Convergence(1e-9, max_rounds=3)
        self.core = core.Migration(True, True, verify, convergence, postcopy=postcopy)
        self.connect()
        self.runs = True
        self.todo = deque()
        self.waiting = False
        self.told_it_does_not_run = False  # by the destination, after it was told to run

    def connect(self):
        self.session = Session(Role.SOURCE)

    def handle(self, event):
        for instruction in self.core.handle(event):
            if isinstance(instruction, core.Finish | core.Pause):
                self.todo.clear()
                self.waiting = False
            self.todo.append(instruction)

    def speak(self, message):
        self.say(self.session.send(message))

    def ask(self, message):
        self.waiting = True
        self.speak(message)

    @property
    def idle(self):
        return self.waiting or not self.todo

    def step(self):  # noqa: PLR0912
        """Carry out the next instruction."""
        match self.todo.popleft():
            case core.OpenChannels():
                self.ask(HELLO)
            case core.Reconnect():
                self.connect()
                self.ask(messages.Resume(1, "id", 1))
            case core.TakeInitial() | core.TakeDirty():
                self.handle(core.Taken(self.pages, self.pages, 1.0, 0.0))
            case core.SendRound(number):
                self.speak(messages.Round(number, 1))
                self.handle(core.RoundDone(self.pages, 0, 1.0))
            case core.StopGuest():
                self.runs = False
                self.handle(core.GuestStopped())
            case core.Verify():
                self.ask(messages.DigestRequest())
            case core.TellMissing():
                self.ask(messages.Missing(0, [0], [1]))
            case core.SendState(postcopy):
                self.ask(messages.DeviceState("demo", b"", postcopy))
            case core.SendRun():
                self.ask(messages.Run())
            case core.SendBackground():
                self.handle(core.BackgroundDone())
            case core.EndPostcopy():
                self.ask(messages.PostcopyEnd())
            case core.Pause(error):
                if self.session.may_pause:
                    self.speak(messages.Paused(error.message))
            case core.Finish(error, resume):
                self._finish(error, resume)
            case core.CutRound():
                pass
            case instruction:
                raise AssertionError(instruction)

    def _finish(self, error, resume):
        if error is not None and self.session.may_abort:
            self.speak(messages.abort_for(error))
        self.runs = self.runs or resume

    def fail(self, error, *, link=False, by_peer=False):
        if link or by_peer or not self.core.run_said or self.core.leaving:
            self.handle(core.Failed(error, by_peer))

    def hear(self, data):
        if self.core.status in FINAL:
            return
        try:
            message = self.session.receive(data)
            self._heard(message)
        except RemoteProtocolError as e:
            self.fail(e, link=True)

    def _heard(self, message):
        match message:
            case messages.Ping():
                return
            case messages.Abort():
                self.told_it_does_not_run |= self.core.run_said
                self.fail(messages.error_of(message), by_peer=True)
            case messages.Paused():
                self.fail(PeerLost(message.message), link=True)
            case messages.Refused() if self.waiting:
                self.waiting = False
                self.fail(messages.error_of(message))
            case _ if self.waiting:
                self.waiting = False
                self.handle(ANSWERS[type(message)])
            case _:
                raise RemoteProtocolError(f"nobody asked for {type(message).__name__}")


class DestinationEnd:
    """A destination that keeps to the protocol. `starts`: its guest can be started."""

    def __init__(self, say, *, starts=True):
        self.say, self.starts = say, starts
        self.session = Session(Role.DESTINATION)
        self.runs = self.over = self.whole = self.paused = False
        self.started = 0
        self.ready = self.committed = self.postcopy = False

    def speak(self, message):
        self.say(self.session.send(message))

    def hear(self, data):  # noqa: PLR0912
        if isinstance(decode_or_none(data), messages.Resume):
            self._resumed(data)
            return
        if self.over or self.paused:
            return
        try:
            message = self.session.receive(data)
        except RemoteProtocolError as e:
            self.fail(e)
            return
        match message:
            case messages.Hello():
                self.speak(messages.Welcome("0", ["tcp:1"], [b"a"], [True]))
            case messages.Discard():
                self.speak(messages.Discarded())
            case messages.Missing():
                self.postcopy = True
                self.speak(messages.Discarded())
            case messages.Contents():
                self.speak(messages.Held(b""))
            case messages.DigestRequest():
                self.speak(messages.Digests([b"x"]))
            case messages.DeviceState():
                if message.postcopy != self.postcopy:
                    self.fail(RemoteProtocolError("pages are missing, and nobody says postcopy"))
                    return
                self.ready = True
                self.speak(messages.StateLoaded())
            case messages.Run():
                self._run()
            case messages.PostcopyEnd():
                self.over = self.whole = True
                self.speak(messages.Ended())
            case messages.Abort():
                self.fail(messages.error_of(message))
            case messages.Paused():
                self.fail(PeerLost(message.message))

    def _run(self):
        assert self.ready and not self.committed
        self.committed = True
        if not self.starts:
            self.over = True
            self.speak(messages.Abort("DestinationError", "it does not start"))
            return
        self.runs = True
        self.started += 1
        self.speak(messages.Running())
        self.over = not self.postcopy

    def _resumed(self, data):
        """The source is back, on a new connection."""
        known = self.committed and self.postcopy and (self.whole or (self.runs and not self.over))
        session = Session(Role.DESTINATION)
        session.receive(data)
        if not known:
            self.say(session.send(messages.Refused("PeerRefused", "uuid", "no such postcopy")))
        elif self.whole:
            self.say(session.send(messages.Ended()))
        else:
            self.session, self.paused = session, False
            self.speak(messages.Resumed(["tcp:1"], [b"a"], ("tcp:2", b"u"), [b"\xff"]))

    def fail(self, error: PageferryError):
        if self.over or self.paused:
            return
        if not self.committed:
            self.over = True
            if self.session.may_abort:
                self.speak(messages.abort_for(error))
        elif self.postcopy:
            self.paused = True
            if self.session.may_pause:
                self.speak(messages.Paused(error.message))

    def die(self, error: PageferryError):
        """Its guest ends, in a postcopy: that is the end of it."""
        self.runs, self.over = False, True
        if not self.paused and self.session.may_abort:
            self.speak(messages.abort_for(error))


def decode_or_none(data):
    try:
        return decode(data)
    except RemoteProtocolError:
        return None
