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
    DEVICE = "device"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)

TRANSITIONS: dict[Status, tuple[Status, ...]] = {
    Status.NONE: (Status.SETUP,),
    Status.SETUP: (Status.ACTIVE, Status.FAILED, Status.CANCELLING),
    Status.ACTIVE: (Status.DEVICE, Status.FAILED, Status.CANCELLING),
    # guest stopped; no way to cancelling once the destination was told to run
    Status.DEVICE: (Status.COMPLETED, Status.FAILED, Status.CANCELLING),
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
        lines += [f"    {status.value} --> {f.value}" for f in following]
        if not following:
            lines.append(f"    {status.value} --> [*]")
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
