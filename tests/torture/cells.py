"""The fault matrix: which cells there are, and what is to come of each. Pure.

A cell is a moment of a migration, a fault, and what it hits. What comes of it follows from two
things, each a table below: what the fault takes away (`loss`), and how far the guest has gone
(`Moment.run`). Rules, not hands, leave out what there cannot be (`exists`).

Most moments are of one kind of run: a demo guest over a network. The others (`Kind`) have what is
their own: who there is, and what comes of it where that is something else.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from pageferry.pipeline.state import FINAL, Status

# ---- moments ----------------------------------------------------------------------------


class RunSaid(enum.Enum):
    """Whether the destination was told to run the guest, and with its memory or before it."""

    NO = "before Run"
    WHOLE = "after Run, memory is there"
    STARTING = "after Run, memory is to come, the guest has not started"
    POSTCOPY = "the guest runs, memory is to come"


class Kind(enum.Enum):
    """What is run, and what its moments have only those faults for that its own parts are in: all
    else is as over a network."""

    NETWORK = "a demo guest, over a network"
    THROTTLED = "a process that is slowed down, into an image"
    STREAM = "a demo guest, over one byte stream (exec: here, a descriptor there)"
    SAVING = "a process, saved to a file"
    RESTORING = "a demo guest, restored from a file by one process"


@dataclass(frozen=True)
class Moment:
    """A state that is held open while the fault comes. `status`: the source's (state.py);
    `by`: what holds it."""

    name: str
    status: Status
    run: RunSaid
    by: str
    kind: Kind = Kind.NETWORK

    def __str__(self) -> str:
        return self.name


_NO, _PRE, _POST = RunSaid.NO, Status.ACTIVE, Status.POSTCOPY_ACTIVE
SETUP = Moment("setup", Status.SETUP, _NO, "the destination starts no receivers")
ROUND_1 = Moment("active, round 1", _PRE, _NO, "max-bandwidth")
ROUND_N = Moment("active, later round", _PRE, _NO, "max-bandwidth, from round 2 on")
ASKING = Moment("active, asked to stop", _PRE, _NO, "who is asked (before_stop) says nothing")
WAITING = Moment("pre-switchover", Status.PRE_SWITCHOVER, _NO, "pause-before-switchover")
LOADING = Moment("device, loading", Status.DEVICE, _NO, "the guest there does not finish loading")
STARTING = Moment(
    "device, told to run", Status.DEVICE, RunSaid.WHOLE, "the guest there does not start"
)
LEAVING = Moment("device, loading, postcopy", Status.DEVICE, _NO, "as device, loading")
JUMPING = Moment(
    "device, told to run, postcopy", Status.DEVICE, RunSaid.STARTING, "as device, told to run"
)
POSTCOPY = Moment("postcopy-active", _POST, RunSaid.POSTCOPY, "max-postcopy-bandwidth")
PAUSED = Moment("postcopy-paused", Status.POSTCOPY_PAUSED, RunSaid.POSTCOPY, "nobody recovers it")
RECOVER = Moment(
    "postcopy-recover",
    Status.POSTCOPY_RECOVER,
    RunSaid.POSTCOPY,
    "the destination starts no receivers",
)

STOPS = Moment("auto-converge, by stops", _PRE, _NO, "max-bandwidth", Kind.THROTTLED)
QUOTA = Moment("dirty-limit, by a quota", _PRE, _NO, "max-bandwidth", Kind.THROTTLED)
STREAM = Moment("stream, active", _PRE, _NO, "max-bandwidth", Kind.STREAM)
STREAM_POSTCOPY = Moment(
    "stream, postcopy-active", _POST, RunSaid.POSTCOPY, "max-postcopy-bandwidth", Kind.STREAM
)
_EXTENTS = "savers are given a half of it"
SAVING = Moment("snapshot, stopped", _PRE, _NO, _EXTENTS, Kind.SAVING)
SAVING_LIVE = Moment("snapshot, live", _PRE, _NO, _EXTENTS, Kind.SAVING)
RESTORING = Moment("restore", _PRE, _NO, "max-bandwidth", Kind.RESTORING)
LAZILY = Moment(
    "restore, lazily", _POST, RunSaid.POSTCOPY, "max-postcopy-bandwidth", Kind.RESTORING
)

MOMENTS = (
    SETUP, ROUND_1, ROUND_N, ASKING, WAITING, LOADING, STARTING, LEAVING, JUMPING, POSTCOPY, PAUSED,
    RECOVER, STOPS, QUOTA, STREAM, STREAM_POSTCOPY, SAVING, SAVING_LIVE, RESTORING, LAZILY,
)  # fmt: skip

# States of state.py that have no moment, and why.
LEFT_OUT = {
    Status.NONE: "nothing has been started",
    Status.CANCELLING: "the source's core is through it within one call (migration.py)",
    **dict.fromkeys(FINAL, "it is over"),
}

# ---- what is hit ------------------------------------------------------------------------


class Victim(enum.Enum):
    """A process, by what it does."""

    SOURCE = "source coordinator"
    DESTINATION = "destination coordinator"
    SENDER = "sender"
    RECEIVER = "receiver"
    URGENT = "urgent sender"
    FAULT = "fault process"
    SOURCE_SERVER = "source fork server"
    DESTINATION_SERVER = "destination fork server"
    SOURCE_GUEST = "source guest"
    DESTINATION_GUEST = "destination guest"
    # a guest that is slowed down
    SLOWER = "throttle process"
    SOURCE_AND_SLOWER = "source coordinator and throttle process"
    # a byte stream
    COMMAND = "command"
    SOURCE_CARRIER = "source carrier"
    DESTINATION_CARRIER = "destination carrier"
    # snapshots: both ends, if there are two, are one process
    COORDINATOR = "coordinator"
    SERVER = "fork server"
    SAVER = "saver"
    GUARD = "guard"
    GUEST = "guest"


class Line(enum.Enum):
    """A link between the ends, and a way on it."""

    WIRE = "the network"
    CONTROL = "control"
    DATA = "data"
    ACKS = "data, answers"
    URGENT = "urgent, answers"
    REQUESTS = "urgent, requests"
    DISK = "destination disk"
    MEMORY = "destination memory"
    STREAM = "the stream, in the middle of a frame"
    FILE = "the file that is read"


class Fault(enum.Enum):
    KILL = "kill -9"
    STOP = "SIGSTOP"
    CUT = "cut"
    RESET = "reset"
    CORRUPT = "corrupt"
    LOSE = "lose"
    REPEAT = "duplicate"
    REORDER = "reorder"
    EXHAUST = "exhaust"
    CANCEL = "cancel"
    TWICE = "cancel, twice"


CANCELS = (Fault.CANCEL, Fault.TWICE)


@dataclass(frozen=True)
class Cell:
    moment: Moment
    fault: Fault
    hit: Victim | Line

    def __str__(self) -> str:
        return f"{self.moment}: {self.what}"

    @property
    def what(self) -> str:
        """The fault, and what it hits: both ways of a connection that breaks."""
        hit = self.hit.value
        if self.fault in CANCELS:
            return self.fault.value
        return f"{self.fault.value} {hit.partition(',')[0] if self.fault is Fault.RESET else hit}"


WORKERS = (Victim.SENDER, Victim.RECEIVER, Victim.URGENT, Victim.FAULT)
_ENDS = (Victim.SOURCE, Victim.DESTINATION)
_PEERS = (
    *_ENDS, *WORKERS, Victim.SOURCE_SERVER, Victim.DESTINATION_SERVER, Victim.SOURCE_GUEST,
    Victim.DESTINATION_GUEST,
)  # fmt: skip
# Of other kinds of runs: who there is, and what else is hit.
OTHERS: dict[Kind, tuple[Victim, ...]] = {
    Kind.THROTTLED: (*_ENDS, Victim.SENDER, Victim.RECEIVER, Victim.SOURCE_SERVER,
                     Victim.SOURCE_GUEST, Victim.SLOWER),
    Kind.STREAM: (*_ENDS, Victim.COMMAND, Victim.SOURCE_CARRIER, Victim.DESTINATION_CARRIER),
    Kind.SAVING: (Victim.COORDINATOR, Victim.SERVER, Victim.SAVER, Victim.GUARD, Victim.GUEST),
    Kind.RESTORING: (Victim.COORDINATOR, Victim.SERVER, *WORKERS, Victim.GUEST),
}  # fmt: skip
MORE: dict[Kind, tuple[tuple[Fault, Victim | Line], ...]] = {
    Kind.THROTTLED: ((Fault.KILL, Victim.SOURCE_AND_SLOWER), (Fault.CANCEL, Victim.SOURCE),
                     (Fault.CUT, Line.WIRE)),
    Kind.STREAM: ((Fault.CUT, Line.STREAM),),
    Kind.SAVING: ((Fault.CANCEL, Victim.COORDINATOR), (Fault.EXHAUST, Line.DISK)),
    Kind.RESTORING: ((Fault.CANCEL, Victim.COORDINATOR), (Fault.TWICE, Victim.COORDINATOR),
                     (Fault.EXHAUST, Line.DISK), (Fault.CORRUPT, Line.FILE),
                     (Fault.CUT, Line.FILE)),
}  # fmt: skip
# The control message that is hit: the next that counts when the moment is no longer held.
NEXT_MESSAGE: dict[Moment, str] = {
    SETUP: "Welcome",
    ROUND_1: "DeviceState",
    ROUND_N: "DeviceState",
    ASKING: "DeviceState",
    WAITING: "DeviceState",
    LOADING: "StateLoaded",
    STARTING: "Running",
    LEAVING: "StateLoaded",
    JUMPING: "Running",
    POSTCOPY: "PostcopyEnd",
    PAUSED: "Resume",
    RECOVER: "Resumed",
}
_FRAME_FAULTS = (Fault.CORRUPT, Fault.LOSE, Fault.REPEAT, Fault.REORDER)


def _frames(moment: Moment) -> bool:
    """Whether frames are on their way."""
    return moment in (ROUND_1, ROUND_N, POSTCOPY)


def exists(cell: Cell) -> bool:
    """Whether there can be such a cell."""
    moment, fault, hit = cell.moment, cell.fault, cell.hit
    if moment.kind is not Kind.NETWORK:
        return _exists_elsewhere(moment, fault, hit)
    if isinstance(hit, Victim):
        if fault not in (Fault.KILL, Fault.STOP) or hit not in _PEERS:
            return False
        if hit in WORKERS and moment is PAUSED:
            return hit is Victim.FAULT  # the others end with their connection
        return not (hit is Victim.RECEIVER and moment in (SETUP, RECOVER))  # they are started next
    return _on_a_line(moment, fault, hit)


def _on_a_line(moment: Moment, fault: Fault, hit: Line) -> bool:
    match hit:
        case Line.WIRE:
            return fault is Fault.CUT
        case Line.DISK:  # an image: nobody runs it
            return fault is Fault.EXHAUST and moment is ROUND_1
        case Line.MEMORY:  # where memory arrives
            return fault is Fault.EXHAUST and moment in (ROUND_1, POSTCOPY)
        case Line.CONTROL if fault is Fault.RESET:
            return moment is not PAUSED  # there is none
        case Line.CONTROL:  # it has no checksum of its own: TCP's, or with keys CURVE's
            return fault in (Fault.LOSE, Fault.REPEAT)
        case Line.DATA if fault is Fault.RESET:
            return moment not in (SETUP, PAUSED, RECOVER)  # there are none
        case Line.URGENT if fault is Fault.RESET:
            return moment not in (SETUP, PAUSED, RECOVER)
        case Line.DATA | Line.ACKS:  # frames are on their way
            return fault in _FRAME_FAULTS and _frames(moment)
        case Line.URGENT | Line.REQUESTS:  # somebody waits for a page
            return fault in _FRAME_FAULTS and moment is POSTCOPY
        case _:  # of another kind of run
            return False


def _exists_elsewhere(moment: Moment, fault: Fault, hit: Victim | Line) -> bool:
    if (fault, hit) in MORE[moment.kind]:
        if fault is Fault.TWICE:
            return moment is LAZILY  # elsewhere once is enough
        # what is restored onto a disk is an image, and nobody runs it
        return not (moment is LAZILY and hit is Line.DISK)
    if fault not in (Fault.KILL, Fault.STOP) or hit not in OTHERS[moment.kind]:
        return False
    if hit is Victim.GUARD:
        return moment is SAVING_LIVE  # nobody writes what stands still
    if hit in (Victim.URGENT, Victim.FAULT):
        return moment is LAZILY
    return True


# Not held: a fault comes when it comes.
ANYWHERE = Moment("at random", Status.NONE, RunSaid.NO, "nothing")


def cells_at_random() -> list[Cell]:
    """What may happen at any time."""
    lines = (Line.CONTROL, Line.DATA, Line.URGENT)
    there = [hit for hit in Victim if exists(Cell(ROUND_1, Fault.KILL, hit))]
    return [
        *(Cell(ANYWHERE, fault, hit) for hit in there for fault in (Fault.KILL, Fault.STOP)),
        *(Cell(ANYWHERE, Fault.RESET, hit) for hit in lines),
    ]


def cells() -> Iterator[Cell]:
    """All there can be."""
    for moment in MOMENTS:
        for hit in (*Victim, *Line):
            for fault in Fault:
                if exists(cell := Cell(moment, fault, hit)):
                    yield cell


# Of other kinds of runs the quick form has only these: the suite has a time that it may take.
IN_EACH_TEST = (
    (STOPS, Fault.KILL, Victim.SOURCE_AND_SLOWER),
    (QUOTA, Fault.KILL, Victim.SOURCE),
    (STREAM, Fault.KILL, Victim.COMMAND),
    (STREAM_POSTCOPY, Fault.CUT, Line.STREAM),
    (SAVING, Fault.KILL, Victim.COORDINATOR),
    (SAVING_LIVE, Fault.EXHAUST, Line.DISK),
    (SAVING_LIVE, Fault.KILL, Victim.GUARD),
    (RESTORING, Fault.KILL, Victim.RECEIVER),
    (LAZILY, Fault.CORRUPT, Line.FILE),
)


def in_each_test(cell: Cell) -> bool:
    """Whether the quick form has it."""
    which = (cell.moment, cell.fault, cell.hit)
    return cell.moment.kind is Kind.NETWORK or which in IN_EACH_TEST


# ---- what is to come of it --------------------------------------------------------------


class Loss(enum.Enum):
    """What a fault takes away."""

    NOTHING = "nothing that was not made good"
    PART = "a worker of the connection"
    LINK = "the connection"
    SOURCE_GUEST = "the guest's process at the source"
    SOURCE_SERVER = "all processes that the source has started"
    SOURCE_END = "the source"
    DESTINATION_GUEST = "the guest's process at the destination"
    DESTINATION_END = "the destination"
    CANCELLED = "the wish to go on"
    GUEST = "the guest's process"
    FILE = "the file that is read"


class Outcome(enum.Enum):
    SOURCE_RUNS = "source runs on"
    COMPLETES = "completed"
    RECOVERS = "paused, recovered, completed"
    ARRIVES = "arrives, source not told"
    UNCONFIRMED = "source stays stopped"
    GUEST_DIES = "guest dies with its host process"
    LOST = "guest lost"
    # of snapshots
    SAVED = "saved, guest runs on"
    NOT_SAVED = "no file, guest runs on"
    SAVED_ALONE = "saved, guest is gone"
    NO_GUEST = "no file, guest is gone"
    NOT_RESTORED = "not restored"


_KILLED = {
    Victim.SOURCE: Loss.SOURCE_END,
    Victim.DESTINATION: Loss.DESTINATION_END,
    Victim.SOURCE_SERVER: Loss.SOURCE_SERVER,
    Victim.DESTINATION_SERVER: Loss.DESTINATION_GUEST,  # all that it started die with it
    Victim.SOURCE_GUEST: Loss.SOURCE_GUEST,
    Victim.DESTINATION_GUEST: Loss.DESTINATION_GUEST,
    **dict.fromkeys(WORKERS, Loss.PART),
    Victim.SLOWER: Loss.PART,
    Victim.SOURCE_AND_SLOWER: Loss.SOURCE_END,
    Victim.COMMAND: Loss.LINK,
    Victim.SOURCE_CARRIER: Loss.LINK,
    Victim.DESTINATION_CARRIER: Loss.LINK,
    Victim.COORDINATOR: Loss.SOURCE_END,
    Victim.SERVER: Loss.SOURCE_SERVER,
    Victim.SAVER: Loss.PART,
    Victim.GUARD: Loss.PART,
    Victim.GUEST: Loss.GUEST,
}
# A process that goes on after a while was only late, unless its heartbeat was missed.
_STOPPED = {
    Victim.SOURCE: Loss.LINK,
    Victim.DESTINATION: Loss.LINK,
    Victim.SOURCE_SERVER: Loss.NOTHING,
    Victim.DESTINATION_SERVER: Loss.NOTHING,
    Victim.SOURCE_GUEST: Loss.NOTHING,
    Victim.DESTINATION_GUEST: Loss.NOTHING,
    **dict.fromkeys(WORKERS, Loss.PART),
    Victim.SLOWER: Loss.PART,
    Victim.COMMAND: Loss.LINK,
    Victim.SOURCE_CARRIER: Loss.LINK,
    Victim.DESTINATION_CARRIER: Loss.LINK,
    Victim.SERVER: Loss.NOTHING,
    Victim.SAVER: Loss.PART,
    Victim.GUARD: Loss.PART,
    Victim.GUEST: Loss.NOTHING,
}
# Checksums, numbers and second requests make good what a link loses or damages. What no link does
# (TCP neither repeats nor turns round) is a peer that breaks the protocol. That an answer was lost
# shows in the next, and nobody knows then what it settled.
_ON_THE_WAY = {
    (Line.DATA, Fault.CORRUPT): Loss.NOTHING,
    (Line.DATA, Fault.LOSE): Loss.NOTHING,
    (Line.DATA, Fault.REPEAT): Loss.LINK,
    (Line.DATA, Fault.REORDER): Loss.LINK,
    (Line.ACKS, Fault.CORRUPT): Loss.LINK,
    (Line.ACKS, Fault.LOSE): Loss.LINK,
    (Line.ACKS, Fault.REPEAT): Loss.NOTHING,
    (Line.ACKS, Fault.REORDER): Loss.LINK,
    (Line.URGENT, Fault.CORRUPT): Loss.NOTHING,
    (Line.URGENT, Fault.LOSE): Loss.NOTHING,
    (Line.URGENT, Fault.REPEAT): Loss.LINK,
    (Line.URGENT, Fault.REORDER): Loss.NOTHING,
    (Line.REQUESTS, Fault.CORRUPT): Loss.NOTHING,
    (Line.REQUESTS, Fault.LOSE): Loss.NOTHING,
    (Line.REQUESTS, Fault.REPEAT): Loss.LINK,
    (Line.REQUESTS, Fault.REORDER): Loss.LINK,
    (Line.CONTROL, Fault.LOSE): Loss.LINK,
    (Line.CONTROL, Fault.REPEAT): Loss.LINK,
    (Line.WIRE, Fault.CUT): Loss.LINK,
    (Line.DISK, Fault.EXHAUST): Loss.PART,
    (Line.MEMORY, Fault.EXHAUST): Loss.DESTINATION_END,
    (Line.STREAM, Fault.CUT): Loss.LINK,
    (Line.FILE, Fault.CORRUPT): Loss.FILE,
    (Line.FILE, Fault.CUT): Loss.FILE,
    # a connection that comes back: what was under way is sent again, and nothing else was
    (Line.CONTROL, Fault.RESET): Loss.NOTHING,
    (Line.DATA, Fault.RESET): Loss.NOTHING,
    (Line.URGENT, Fault.RESET): Loss.NOTHING,
}


def loss(cell: Cell) -> Loss:
    """What is gone after it."""
    if cell.fault in CANCELS:
        return Loss.CANCELLED
    if (cell.fault, cell.hit) == (Fault.STOP, Victim.COORDINATOR):  # both ends of a restore
        return Loss.LINK if cell.moment.kind is Kind.RESTORING else Loss.NOTHING
    if isinstance(cell.hit, Victim):
        return (_KILLED if cell.fault is Fault.KILL else _STOPPED)[cell.hit]
    return _ON_THE_WAY[cell.hit, cell.fault]


_N, _W, _S, _P = RunSaid.NO, RunSaid.WHOLE, RunSaid.STARTING, RunSaid.POSTCOPY
OUTCOMES: dict[Loss, dict[RunSaid, Outcome]] = {
    Loss.NOTHING: dict.fromkeys(RunSaid, Outcome.COMPLETES),
    # nothing is needed of the source once the whole guest was told to run
    Loss.PART: {_N: Outcome.SOURCE_RUNS, _W: Outcome.COMPLETES,
                _S: Outcome.RECOVERS, _P: Outcome.RECOVERS},
    Loss.LINK: {_N: Outcome.SOURCE_RUNS, _W: Outcome.ARRIVES,
                _S: Outcome.RECOVERS, _P: Outcome.RECOVERS},
    # its memory outlives it, and that is all a postcopy needs
    Loss.SOURCE_GUEST: {_N: Outcome.GUEST_DIES, _W: Outcome.COMPLETES,
                        _S: Outcome.COMPLETES, _P: Outcome.COMPLETES},
    Loss.SOURCE_SERVER: {_N: Outcome.GUEST_DIES, _W: Outcome.COMPLETES,
                         _S: Outcome.RECOVERS, _P: Outcome.RECOVERS},
    Loss.SOURCE_END: {_N: Outcome.GUEST_DIES, _W: Outcome.ARRIVES,
                      _S: Outcome.LOST, _P: Outcome.LOST},
    # the destination says that the guest does not run: the source has it back
    Loss.DESTINATION_GUEST: {_N: Outcome.SOURCE_RUNS, _W: Outcome.SOURCE_RUNS,
                             _S: Outcome.SOURCE_RUNS, _P: Outcome.LOST},
    Loss.DESTINATION_END: {_N: Outcome.SOURCE_RUNS, _W: Outcome.UNCONFIRMED,
                           _S: Outcome.LOST, _P: Outcome.LOST},
}  # fmt: skip


# Where it is something else. A process outlives who moves it, so it runs on whoever dies.
_P_RUNS, _P_GONE = Outcome.SOURCE_RUNS, Outcome.GUEST_DIES
THROTTLED: dict[Loss, Outcome] = {
    Loss.NOTHING: Outcome.COMPLETES, Loss.PART: _P_RUNS, Loss.LINK: _P_RUNS,
    Loss.SOURCE_GUEST: _P_GONE, Loss.SOURCE_SERVER: _P_RUNS, Loss.SOURCE_END: _P_RUNS,
    Loss.DESTINATION_END: _P_RUNS, Loss.CANCELLED: _P_RUNS,
}  # fmt: skip
SNAPSHOTS: dict[Loss, dict[Moment, Outcome]] = {
    Loss.NOTHING: {SAVING: Outcome.SAVED, SAVING_LIVE: Outcome.SAVED,
                   RESTORING: Outcome.COMPLETES, LAZILY: Outcome.COMPLETES},
    Loss.PART: {SAVING: Outcome.NOT_SAVED, SAVING_LIVE: Outcome.NOT_SAVED,
                RESTORING: Outcome.NOT_RESTORED, LAZILY: Outcome.RECOVERS},
    # the guest that was restored is a child of the fork server; one that is saved is not
    Loss.SOURCE_SERVER: {SAVING: Outcome.NOT_SAVED, SAVING_LIVE: Outcome.NOT_SAVED,
                         RESTORING: Outcome.NOT_RESTORED, LAZILY: Outcome.LOST},
    Loss.SOURCE_END: {SAVING: Outcome.NOT_SAVED, SAVING_LIVE: Outcome.NOT_SAVED,
                      RESTORING: Outcome.NOT_RESTORED, LAZILY: Outcome.LOST},
    # what stands still is there as long as somebody has it open
    Loss.GUEST: {SAVING: Outcome.SAVED_ALONE, SAVING_LIVE: Outcome.NO_GUEST,
                 RESTORING: Outcome.NOT_RESTORED, LAZILY: Outcome.LOST},
    Loss.CANCELLED: {SAVING: Outcome.NOT_SAVED, SAVING_LIVE: Outcome.NOT_SAVED,
                     RESTORING: Outcome.NOT_RESTORED, LAZILY: Outcome.LOST},
    Loss.LINK: {RESTORING: Outcome.NOT_RESTORED, LAZILY: Outcome.RECOVERS},
    Loss.FILE: {RESTORING: Outcome.NOT_RESTORED, LAZILY: Outcome.LOST},
}  # fmt: skip


# A StateLoaded that comes twice is seen when it comes again: the source has said Run by then.
_SEEN_LATER = {LOADING: STARTING, LEAVING: JUMPING}


def expected(cell: Cell) -> Outcome:
    """What is to come of it."""
    moment = cell.moment
    if moment.kind is Kind.THROTTLED:
        return THROTTLED[loss(cell)]
    if cell.moment is LAZILY and cell.fault is Fault.CANCEL:
        return Outcome.COMPLETES  # it says that the guest would be lost
    if moment is SAVING and (cell.fault, cell.hit) == (Fault.STOP, Victim.GUEST):
        return Outcome.NOT_SAVED  # somebody lets it go on while it is saved
    if moment.kind in (Kind.SAVING, Kind.RESTORING):
        return SNAPSHOTS[loss(cell)][moment]
    if (cell.hit, cell.fault) == (Line.CONTROL, Fault.REPEAT):
        moment = _SEEN_LATER.get(moment, moment)
    found = OUTCOMES[loss(cell)][moment.run]
    if found is Outcome.COMPLETES and cell.moment in (PAUSED, RECOVER):
        return Outcome.RECOVERS
    return found


def allowed(cell: Cell) -> set[Outcome]:
    """What may come of it: at no moment in particular, what may at any, or it comes too late. A
    connection with frames on their way may take answers along when it breaks. The kernel may choose
    a worker when memory runs out."""
    if cell.moment is not ANYWHERE:
        found = {expected(cell)}
        if (cell.fault, cell.hit) == (Fault.RESET, Line.DATA) and _frames(cell.moment):
            found.add(OUTCOMES[Loss.LINK][cell.moment.run])
        if (cell.moment, cell.hit, cell.fault) == (POSTCOPY, Line.CONTROL, Fault.REPEAT):
            found.add(Outcome.COMPLETES)  # it was the last word of all
        if (cell.moment, cell.hit) == (POSTCOPY, Line.MEMORY):
            found.add(Outcome.RECOVERS)
        if (cell.moment, cell.fault, cell.hit) == (STOPS, Fault.STOP, Victim.SLOWER):
            found.add(Outcome.COMPLETES)  # stopped by it just then it writes nothing, and has moved
        if (cell.fault, cell.hit) == (Fault.STOP, Victim.COORDINATOR):
            found |= {expected(cell)} if loss(cell) is Loss.NOTHING else {Outcome.COMPLETES}
        return found
    if cell.fault is Fault.RESET:  # it may come while something is on its way
        return {Outcome.COMPLETES, *OUTCOMES[Loss.LINK].values()}
    at = [Cell(moment, cell.fault, cell.hit) for moment in MOMENTS if moment.kind is Kind.NETWORK]
    return {expected(one) for one in at if exists(one)} | {Outcome.COMPLETES}


# Seconds from a fault to the error at an end that lives: a process of its own that is dead is
# seen at once, all else by silence.
BOUND_SECONDS, LOCAL_SECONDS = 5.0, 2.0
SOURCE_SIDE = (
    Victim.SENDER, Victim.URGENT, Victim.SOURCE_SERVER, Victim.SOURCE_GUEST, Victim.SLOWER,
    Victim.COMMAND, Victim.SOURCE_CARRIER,
)  # fmt: skip


def bound(cell: Cell) -> float:
    """Within how many seconds both ends are to know."""
    ends = (Victim.SOURCE, Victim.DESTINATION, Victim.SOURCE_AND_SLOWER)
    if cell.fault is Fault.KILL and cell.hit not in ends:
        return LOCAL_SECONDS  # a dead local process; the other end is told at once
    return BOUND_SECONDS
