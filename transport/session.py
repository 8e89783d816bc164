"""The control session: which message may be sent and received when. Sans-IO.

Both ends run this one machine, with the role as a parameter. The table below is the whole
of it; the picture in ARCHITECTURE.md is drawn from it (`python -m pageferry.transport.session`).
An illegal message raises and changes nothing: LocalProtocolError if it is ours,
RemoteProtocolError if it is the peer's.
"""

from __future__ import annotations

import enum

from .errors import LocalProtocolError, RemoteProtocolError
from .messages import (
    Abort,
    AnyMessage,
    Armed,
    Contents,
    DeviceState,
    DigestRequest,
    Digests,
    Discard,
    Discarded,
    Ended,
    Held,
    Hello,
    Layout,
    Missing,
    Offer,
    Paused,
    Ping,
    PostcopyEnd,
    Pull,
    Refused,
    Resume,
    Resumed,
    Round,
    Run,
    Running,
    Serving,
    StateLoaded,
    StatePart,
    SwitchoverAck,
    Welcome,
    decode,
    encode,
)


class Role(enum.Enum):
    SOURCE = "source"
    DESTINATION = "destination"


class Phase(enum.Enum):
    IDLE = "idle"
    GREETING = "greeting"
    MOVING = "moving"
    DISCARDING = "discarding"
    COMPARING = "comparing"
    DIGESTING = "digesting"
    LOADING = "loading"
    LOADED = "loaded"
    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    RESUMING = "resuming"
    PULLING = "pulling"
    OFFERED = "offered"
    LAYING_OUT = "laying-out"
    SERVED = "served"
    CLOSED = "closed"


S, D = Role.SOURCE, Role.DESTINATION
# (phase, who speaks, message) -> next phase
TRANSITIONS: dict[tuple[Phase, Role, type[AnyMessage]], Phase] = {
    (Phase.IDLE, S, Hello): Phase.GREETING,
    (Phase.GREETING, D, Welcome): Phase.MOVING,
    (Phase.GREETING, D, Refused): Phase.CLOSED,
    (Phase.MOVING, S, Discard): Phase.DISCARDING,
    (Phase.MOVING, S, Missing): Phase.DISCARDING,
    (Phase.DISCARDING, D, Discarded): Phase.MOVING,
    (Phase.MOVING, S, Contents): Phase.COMPARING,
    (Phase.COMPARING, D, Held): Phase.MOVING,
    (Phase.MOVING, S, Round): Phase.MOVING,
    # no answer to anything: it may come while something else is answered
    (Phase.MOVING, D, SwitchoverAck): Phase.MOVING,
    (Phase.DISCARDING, D, SwitchoverAck): Phase.DISCARDING,
    (Phase.COMPARING, D, SwitchoverAck): Phase.COMPARING,
    (Phase.MOVING, S, DigestRequest): Phase.DIGESTING,
    (Phase.DIGESTING, D, Digests): Phase.MOVING,
    (Phase.MOVING, S, StatePart): Phase.MOVING,
    (Phase.MOVING, S, DeviceState): Phase.LOADING,
    (Phase.LOADING, D, StateLoaded): Phase.LOADED,
    (Phase.LOADED, S, Run): Phase.STARTING,
    (Phase.STARTING, D, Running): Phase.RUNNING,
    # postcopy only: in precopy nothing follows
    (Phase.RUNNING, S, PostcopyEnd): Phase.ENDING,
    (Phase.ENDING, D, Ended): Phase.CLOSED,
    (Phase.IDLE, S, Resume): Phase.RESUMING,
    (Phase.RESUMING, D, Resumed): Phase.RUNNING,
    (Phase.RESUMING, D, Ended): Phase.CLOSED,
    (Phase.RESUMING, D, Refused): Phase.CLOSED,
    # the destination dials: a snapshot is restored
    (Phase.IDLE, D, Pull): Phase.PULLING,
    (Phase.PULLING, S, Offer): Phase.OFFERED,
    (Phase.PULLING, S, Refused): Phase.CLOSED,
    (Phase.OFFERED, D, Layout): Phase.LAYING_OUT,
    (Phase.LAYING_OUT, S, Serving): Phase.SERVED,
    (Phase.SERVED, D, Armed): Phase.RUNNING,
}
# Abort ends every phase, but once the source has said Run, only the destination may still say that
# the guest does not run there (any more).
_COMMITTED = (Phase.STARTING, Phase.RUNNING, Phase.ENDING, Phase.RESUMING)
for _phase in Phase:
    if _phase not in (Phase.IDLE, Phase.CLOSED):
        for _role in Role:
            if not (_phase in _COMMITTED and _role is S):
                TRANSITIONS[_phase, _role, Abort] = Phase.CLOSED
            TRANSITIONS[_phase, _role, Ping] = _phase
            if _phase in _COMMITTED:
                TRANSITIONS[_phase, _role, Paused] = Phase.CLOSED


class Session:
    """One end of a control session."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.phase = Phase.IDLE

    def __repr__(self) -> str:
        return f"<Session {self.role.value} {self.phase.value}>"

    def send(self, message: AnyMessage) -> bytes:
        """The bytes of `message`, if it is our turn to say it."""
        following = TRANSITIONS.get((self.phase, self.role, type(message)))
        if following is None:
            raise LocalProtocolError(f"{type(message).__name__} is not ours to say in {self!r}")
        data = encode(message)
        self.phase = following
        return data

    def receive(self, data: bytes | memoryview) -> AnyMessage:
        """The message in `data`, if it is the peer's turn to say it."""
        message = decode(data)
        peer = D if self.role is S else S
        following = TRANSITIONS.get((self.phase, peer, type(message)))
        if following is None:
            raise RemoteProtocolError(f"{type(message).__name__} came in phase {self.phase.value}")
        self.phase = following
        return message

    def may_send(self, message: type[AnyMessage]) -> bool:
        """True if it is our turn to say it."""
        return (self.phase, self.role, message) in TRANSITIONS

    @property
    def may_pause(self) -> bool:
        return (self.phase, self.role, Paused) in TRANSITIONS

    @property
    def may_abort(self) -> bool:
        return (self.phase, self.role, Abort) in TRANSITIONS


def diagram() -> str:
    """The table as a mermaid state diagram; Abort, Paused and Ping, legal nearly everywhere, left
    out."""
    lines = ["stateDiagram-v2", "    [*] --> idle"]
    for (phase, role, message), following in TRANSITIONS.items():
        if message not in (Abort, Paused, Ping):
            # mermaid takes no dash in a name
            before, after = (p.value.replace("-", "_") for p in (phase, following))
            lines.append(f"    {before} --> {after}: {role.value}: {message.__name__}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
