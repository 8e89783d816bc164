"""What travels beside memory: how the source ran, its guest's sections, those of tools. Pure.

    globalstate     running or paused (QEMU: migration/global_state.c)
    demo, qemu, …   the guest's, called as its kind (workers/guests/states.py)
    anything else   a tool's, that both ends gave (api.send, Destination.sections)

At the destination everything is looked at first; then tools' sections are loaded, and then the
guest's, which costs most if it was for nothing: a QEMU that was given devices takes no others. Any
error leaves the guest there not running, and has the section's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..transport.errors import PeerRefused, RemoteProtocolError, UsageError
from ..transport.vmstate import Description, Field, Section, Text, join, load, parse, save
from ..transport.vmstate.description import twice
from ..transport.vmstate.stream import load_one

# Hooks of tools' sections run while the guest stands still; who takes longer is not waited for.
HOOK_SECONDS = 30.0
# `none`: memory that nobody writes has no run state.
RUNNING, PAUSED, NONE = "running", "paused", "none"
RUN_STATES = (RUNNING, PAUSED, NONE)
# Sections that tools cannot have.
RESERVED = frozenset({"globalstate", "demo", "qemu", "image", "ram", "sample"})


@dataclass
class RunState:
    """`runstate`: one of RUN_STATES."""

    runstate: str = NONE


GLOBAL_STATE = Description("globalstate", 1, 1, (Field("runstate", Text(100)),))


@dataclass(frozen=True)
class Arrived:
    """What came. `guest`: the device state of the guest's sections, b"" if it has none."""

    runstate: str
    guest: bytes

    @property
    def running(self) -> bool:
        return self.runstate == RUNNING


def check_sections(sections: Sequence[Section]) -> None:
    """UsageError for sections that could not travel: found before anything moves."""
    for section in sections:
        name = section.description.name
        if name.partition("/")[0] in RESERVED:
            raise UsageError(f"section {name!r}: that name is a guest's, take another")
    if (key := twice(sections)) is not None:
        raise UsageError(f"two sections are called {key[0]!r} ({key[1]})")


def run_state(*, live: bool, running: bool) -> str:
    """Of a source guest. A snapshot is not live, and its guest may have been running."""
    return RUNNING if running else PAUSED if live else NONE


def compose(guest_state: bytes, runstate: str, sections: Sequence[Section]) -> bytes:
    """The device state of a migration. Calls hooks; SourceError names what cannot be saved."""
    ours = parse(save([Section(GLOBAL_STATE, RunState(runstate))]))
    guests = parse(guest_state) if guest_state else []
    return join([*ours, *guests, *(parse(save(sections)) if sections else [])])


def take(
    data: bytes,
    kind: str,
    sections: Sequence[Section],
    keeps_all: bool = False,
    is_given_up: Callable[[], bool] = lambda: False,
) -> Arrived:
    """What came from a guest of `kind`; tools' `sections` are loaded, unless it `is_given_up`
    before. `keeps_all`: the guest here takes whatever nobody knows, too. Errors as those of
    vmstate.load."""
    known = {section.key: section for section in sections}
    found, ours, guests = RunState(""), [], []
    for saved in parse(data):
        if saved.key == (GLOBAL_STATE.name, 0):
            load_one(saved, Section(GLOBAL_STATE, found))
        elif saved.key in known:
            ours.append(saved)
        elif keeps_all or saved.name == kind or saved.name.startswith(f"{kind}/"):
            guests.append(saved)
        else:
            where = f"{saved.name!r}" + (f" ({saved.instance})" if saved.instance else "")
            raise PeerRefused(
                f"device state: section {where} came, and is not known here",
                section=saved.name, instance=saved.instance,
            )  # fmt: skip
    if found.runstate not in RUN_STATES:
        raise RemoteProtocolError(
            f"device state: section {GLOBAL_STATE.name!r} is missing, or of a run state that is "
            f"none: {found.runstate!r}",
            section=GLOBAL_STATE.name,
        )
    load(ours, sections, is_given_up)
    return Arrived(found.runstate, join(guests) if guests else b"")
