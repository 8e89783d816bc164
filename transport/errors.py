"""Every error pageferry raises, each with its exit code and its control-API class.

    PageferryError                      1   our own fault, if nothing more exact fits
    ├── LocalProtocolError              1   we broke our own protocol: a bug
    ├── UsageError                      2   an option, a parameter or a URI makes no sense
    ├── SourceError                     3   the source cannot be opened, read or tracked
    │   └── AttachError
    ├── DestinationError                4   the destination cannot be written
    │   ├── DestinationTooSmall
    │   ├── GuestGone
    │   └── NoSpace
    ├── ConnectError                    5   nobody answers at the address, or somebody else does
    ├── PeerRefused                     6   the peer said no: `field` names what does not match
    ├── PeerLost                        7   the peer died, went silent or gave up
    ├── RemoteProtocolError             8   the peer broke the protocol
    ├── WorkerDied                      9   one of our processes died or stopped answering
    ├── NotConverging                  10   the guest writes faster than its memory moves
    ├── VerificationFailed             11   digests differ, or the oracle found wrong bytes
    ├── HostLacks                      12   the kernel or a permission is missing
    ├── ConfirmationLost               13   the destination may be running: the source stays stopped
    ├── PostcopyFailed                 14   the guest runs there, its memory is not whole
    ├── BatchPartial                   15   some items of a batch arrived, others did not
    ├── BatchFailed                    16   no item of a batch arrived
    └── Cancelled                     130   somebody asked for it

Errors carry data, pickle across processes, and know nothing of terminals or sockets.
"""

from __future__ import annotations

from typing import Any


class PageferryError(Exception):
    """pageferry failed in a way it has no better word for; please report it"""

    exit_code = 1
    qmp_class = "GenericError"

    def __init__(self, message: str | None = None, **data: Any) -> None:
        self.message = message if message is not None else (self.__doc__ or "").strip()
        self.data = data
        super().__init__(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.data))

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[PageferryError], message: str, data: dict[str, Any]) -> PageferryError:
    return cls(message, **data)


class LocalProtocolError(PageferryError):
    """pageferry broke its own protocol; please report it"""


class UsageError(PageferryError):
    """an option or a URI makes no sense"""

    exit_code = 2


class SourceError(PageferryError):
    """the source cannot be read"""

    exit_code = 3


class AttachError(SourceError):
    """a process cannot be attached to"""


class DestinationError(PageferryError):
    """the destination cannot be written"""

    exit_code = 4


class DestinationTooSmall(DestinationError):
    """the destination is smaller than the source"""


class GuestGone(DestinationError):
    """the guest at the destination has ended"""


class NoSpace(DestinationError):
    """no space is left at the destination"""


class ConnectError(PageferryError):
    """nobody answers at this address"""

    exit_code = 5


class PeerRefused(PageferryError):
    """the peer refused the migration"""

    exit_code = 6


class PeerLost(PageferryError):
    """the peer died or went silent"""

    exit_code = 7


class RemoteProtocolError(PageferryError):
    """the peer broke the protocol"""

    exit_code = 8


class WorkerDied(PageferryError):
    """a worker process died"""

    exit_code = 9


class NotConverging(PageferryError):
    """the guest writes faster than its memory can be moved"""

    exit_code = 10


class VerificationFailed(PageferryError):
    """what arrived is not what was sent"""

    exit_code = 11


class HostLacks(PageferryError):
    """this host lacks something that is needed"""

    exit_code = 12


class ConfirmationLost(PageferryError):
    """the destination was told to run and has not confirmed it: the source stays stopped"""

    exit_code = 13


class PostcopyFailed(PageferryError):
    """the guest was started at the destination and part of its memory never arrived"""

    exit_code = 14


class BatchPartial(PageferryError):
    """some items of a batch failed"""

    exit_code = 15


class BatchFailed(PageferryError):
    """all items of a batch failed"""

    exit_code = 16


class Cancelled(PageferryError):
    """cancelled"""

    exit_code = 130


def as_ours(error: BaseException) -> PageferryError:
    """`error` as one of the tree; what is not ours keeps its name in the text."""
    if isinstance(error, PageferryError):
        return error
    wrapped = PageferryError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def all_errors() -> list[type[PageferryError]]:
    """Every class of the tree, base first, in the order in which they are defined above."""
    found: list[type[PageferryError]] = [PageferryError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found


def by_name(name: str, message: str, **data: Any) -> PageferryError:
    """The error a worker or the peer named; an unknown name becomes the base class."""
    for cls in all_errors():
        if cls.__name__ == name:
            return cls(message, **data)
    return PageferryError(message, **data)
