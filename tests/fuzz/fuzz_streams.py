"""A byte stream's end, and whatever comes to it."""

from __future__ import annotations

from pageferry.transport.errors import PeerRefused, RemoteProtocolError
from pageferry.transport.streams import (
    MAGIC,
    MAX_CONNECTIONS,
    MOST_NOISE,
    WINDOW,
    Arrived,
    Closed,
    Mux,
    Opened,
)


def stream(data: bytes) -> None:
    """Byte 0: which end it is, and how the rest is cut. What is handed out has its connection, and
    no connection more than its window; nothing but our own errors gets out."""
    if not data:
        return
    dials, step = bool(data[0] & 1), 1 + (data[0] >> 1) * 7
    mux, waits = Mux(dials=dials, name="" if dials else "@here"), dict[int, int]()
    said = MAGIC + data[1:] if data[0] & 2 else data[1:]
    try:
        for at in range(0, len(said), step):
            _hear(mux, said[at : at + step], float(at), waits)
            mux.output(idle=True)
            assert mux.choose() is None
    except (RemoteProtocolError, PeerRefused):
        pass
    assert mux.connections <= MAX_CONNECTIONS
    assert len(mux.noise) <= MOST_NOISE + len(MAGIC) + step


def _hear(mux: Mux, data: bytes, now: float, waits: dict[int, int]) -> None:
    for event in mux.receive(data, now):
        match event:
            case Opened(number, _):
                assert not mux.dials and number not in waits
                waits[number] = 0
            case Arrived(number, piece):
                waits[number] += len(piece)
                assert waits[number] <= WINDOW
                if number % 2:  # the reader of the others takes nothing
                    mux.taken(number, waits[number])
                    waits[number] = 0
            case Closed(number):
                del waits[number]


TARGETS = {"stream": stream}
