"""The states of a migration and the table of what may follow what. QEMU's names, where it has them
(MigrationStatus in qapi/migration.json). Pure; the picture in ARCHITECTURE.md is drawn from it
(`python -m pageferry.pipeline.state`).
"""

from __future__ import annotations

import enum

from ..transport.errors import LocalProtocolError


class Status(enum.Enum):
    """What query-migrate says."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER = "postcopy-recover"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


# The guest was started at the destination before its memory was there.
IN_POSTCOPY = (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER)
FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)

TRANSITIONS: dict[Status, tuple[Status, ...]] = {
    Status.NONE: (Status.SETUP,),
    Status.SETUP: (Status.ACTIVE, Status.FAILED, Status.CANCELLING),
    Status.ACTIVE: (Status.DEVICE, Status.FAILED, Status.CANCELLING, Status.PRE_SWITCHOVER),
    # the guest, if it can be, is stopped, until somebody says migrate-continue
    Status.PRE_SWITCHOVER: (Status.DEVICE, Status.FAILED, Status.CANCELLING),
    # guest stopped; no way to cancelling once the destination was told to run
    Status.DEVICE: (
        Status.COMPLETED,
        Status.FAILED,
        Status.CANCELLING,
        Status.POSTCOPY_ACTIVE,
        Status.POSTCOPY_PAUSED,
    ),
    # the guest runs at the destination, its memory follows
    Status.POSTCOPY_ACTIVE: (Status.COMPLETED, Status.FAILED, Status.POSTCOPY_PAUSED),
    Status.POSTCOPY_PAUSED: (Status.POSTCOPY_RECOVER, Status.FAILED),
    Status.POSTCOPY_RECOVER: (
        Status.POSTCOPY_ACTIVE,
        Status.POSTCOPY_PAUSED,
        Status.FAILED,
        Status.COMPLETED,
    ),
    Status.CANCELLING: (Status.CANCELLED, Status.FAILED),
    Status.COMPLETED: (),
    Status.FAILED: (),
    Status.CANCELLED: (),
}


def advance(current: Status, following: Status) -> Status:
    """`following`, if the table allows it; LocalProtocolError otherwise."""
    if following not in TRANSITIONS[current]:
        raise LocalProtocolError(f"status {current.value} cannot become {following.value}")
    return following


def diagram() -> str:
    """The table as a mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> none"]
    for status, following in TRANSITIONS.items():
        # mermaid takes no dash in a name
        name = status.value.replace("-", "_")
        lines += [f"    {name} --> {f.value.replace('-', '_')}" for f in following]
        if not following:
            lines.append(f"    {name} --> [*]")
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
