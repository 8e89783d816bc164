"""The Python interface: `migrate` and its parts, for host tooling.

    import pageferry
    report = pageferry.migrate("image:vm.mem", "image:copy.mem", codec="zstd", verify=True)

SOURCE and DESTINATION are the URIs of the command line; a destination may also be the address
(tcp://, ipc://) of a `pageferry receive` elsewhere, or a stream to one (exec:COMMAND, fd:N).
Keyword arguments are the fields of `Parameters`; `state` and `state_there` are sections that travel
beside memory (transport/vmstate/, docs/device-state.md). Errors are the tree in
pageferry.transport.errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Protocol

from ..transport.carrier import claim
from ..transport.errors import (
    PageferryError,
    PeerLost,
    PeerRefused,
    PostcopyFailed,
    SourceError,
    UsageError,
    VerificationFailed,
)
from ..transport.links import Endpoint, parse_endpoint, probe
from ..transport.messages import Hello
from ..transport.stream_addresses import Stream, is_stream, parse_stream
from ..transport.vmstate import Section
from ..workers.content import ContentIndex
from ..workers.forking import warm_up
from ..workers.guests import (
    DestinationGuest,
    GuestUri,
    SourceGuest,
    check_destination,
    open_destination,
    open_source,
    parse_guest,
    start_qemu,
)
from ..workers.guests.base import TRACKING_HASH
from ..workers.guests.shared_memory import path_of
from ..workers.guests.snapshot import SnapshotSource
from ..workers.reserve import Reserve
from .arrival import Arrival
from .blocking import Blocking, to_its_end
from .callbacks import tell
from .carriage import Carriage, dialled
from .destination import Destination
from .device_state import check_sections
from .monitor import Monitor, serve_monitor
from .parameters import Parameters
from .reception import Reception
from .restoring import Restoring
from .serving import Server
from .snapshot import Snapshot
from .source import Source
from .state import IN_POSTCOPY, Status
from .tracing import recording

# Pauses of a lazy restore that are recovered from: both ends are here, and there is nobody to ask.
_RECOVERIES = 10
Progress = Callable[[dict[str, Any]], None]
_log = logging.getLogger("pageferry")


class Started(Protocol):
    """Called with the object that can be asked and cancelled, before anything moves."""

    def __call__(self, migration: Source | Destination) -> None: ...


def parse_target(text: str) -> Endpoint | Stream:
    """Where a receiver is to be found, or UsageError."""
    return parse_stream(text) if is_stream(text) else parse_endpoint(text)


async def _opened(source: GuestUri) -> SourceGuest:
    """The guest of `source`. Cancelled, nothing of it stays open."""
    opening = Blocking()
    try:
        return await opening(open_source, source)
    except asyncio.CancelledError:
        if (opened := await to_its_end(opening.idle())) is not None:
            opened.close()
        raise


async def send(
    source: GuestUri,
    endpoint: Endpoint | Stream,
    parameters: Parameters,
    *,
    on_progress: Progress | None = None,
    on_started: Started | None = None,
    monitor: str | None = None,
    identity: bytes | None = None,
    name: str = "",
    reserve: Reserve | None = None,
    receiver_cpu: Callable[[], float | None] = lambda: None,
    on_attached: Callable[[SourceGuest], None] | None = None,
    state: Sequence[Section] = (),
) -> dict[str, Any]:
    """Migrate `source` to the receiver at `endpoint`, or at the other end of it. Returns the
    report, raises the error. `name`: what it is to be called in a receiver's directory; by default
    as its file here. `reserve`: where worker processes come from, if they are not to be its own.
    `receiver_cpu`: processor seconds of the receivers, where that is known. `on_attached`: called
    when the guest is open, and before anything is started for it: here root can be given up.
    `state`: sections that are saved when the guest stands still, and travel beside its memory; the
    receiver must know them (`Destination.sections`)."""
    parameters = parameters.checked()
    check_sections(state)
    if isinstance(endpoint, Stream):
        endpoint = claim(endpoint)
    if on_attached is None:
        warm_up()
    guest = await _opened(source)
    try:
        if on_attached is not None:
            on_attached(guest)
            warm_up()
        async with dialled(endpoint) as (there, carriage), AsyncExitStack() as stack:
            migration = Source(
                guest, there, parameters, on_progress, identity=identity,
                name=name or _name_of(source), reserve=reserve,
            )  # fmt: skip
            migration.receiver_cpu, migration.sections = receiver_cpu, tuple(state)
            migration.carriage = carriage
            carriage.on_failure, carriage.monitor = migration.link_broke, monitor or ""
            await _attach_monitor(stack, monitor, migration)
            if on_started is not None:
                on_started(migration)
            report = await migration.run()
            report["processes"] = [*report["processes"], *carriage.processes()]
            return report
    finally:
        await to_its_end(asyncio.to_thread(guest.close))


def _name_of(source: GuestUri) -> str:
    return os.path.basename(source.rest.rstrip("/")) if source.rest else ""


async def _attach_monitor(
    stack: AsyncExitStack, where: str | None, migration: Source | Destination
) -> None:
    if where is None:
        return
    monitor: Monitor = await stack.enter_async_context(serve_monitor(where, migration))
    migration.on_event = monitor.emit


async def receive(
    destination: Destination,
    on_report: Callable[[dict[str, Any] | None, PageferryError | None], None],
    *,
    once: bool,
    monitor: str | None = None,
) -> None:
    """Serve migrations at `destination` until cancelled; with `once` just one, whose error is
    raised. Trial runs (`pageferry tune`) do not count, and are not reported."""
    async with AsyncExitStack() as stack:
        await _attach_monitor(stack, monitor, destination)
        while True:
            before = destination.query()
            try:
                report: dict[str, Any] | None = await receive_one(destination)
                error = None
            except asyncio.CancelledError:
                last = destination.query()
                if last is not before and last["status"] == Status.COMPLETED.value:
                    on_report(last, None)  # it arrived all the same
                raise
            except PageferryError as e:
                report, error = None, e
            if (report or (error.data.get("report") if error else None) or {}).get("trial"):
                continue  # a trial run: nothing arrived, and nothing was to
            on_report(report, error)
            if once and error is not None:
                raise error
            if once:
                return


async def receive_stream(
    stream: Stream,
    destination: Destination,
    on_report: Callable[[dict[str, Any] | None, PageferryError | None], None],
    *,
    monitor: str | None = None,
) -> None:
    """The one migration that comes over `stream` to `destination`, which listens at ipc://. Its
    error is raised, or that of the stream if nothing came. A postcopy whose stream ends waits for
    its source to come back, by `join`."""
    stream = claim(stream)
    receiving: asyncio.Future[None] | None = None
    broke: list[PageferryError] = []

    def failed(error: PageferryError) -> None:
        arrival = destination.arrival
        if arrival is not None:
            if not arrival.resumed:  # else perhaps by another way than this; if not, silence tells
                arrival.fail(error)
            if arrival.status in IN_POSTCOPY:
                _log.warning(
                    "the guest runs here, and its memory can still come: this receiver listens at "
                    "%s (`pageferry relay`)", destination.endpoint,
                )  # fmt: skip
        elif receiving is not None:
            broke.append(error)
            receiving.cancel()

    carriage = Carriage(failed)
    hurry = True
    try:
        receiving = asyncio.ensure_future(
            receive(destination, on_report, once=True, monitor=monitor)
        )
        await carriage.answer(stream, destination.endpoint)
        await _result_of(receiving, broke)
        hurry = False
    finally:
        if receiving is not None and not receiving.done():
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
        destination.close()  # what it has said is on its way then
        await to_its_end(carriage.close(hurry=hurry))


async def _result_of(receiving: asyncio.Future[None], broke: list[PageferryError]) -> None:
    try:
        await receiving
    except asyncio.CancelledError:
        if broke:
            raise broke[0] from None
        raise


async def join(stream: Stream, endpoint: Endpoint) -> None:
    """Connect the source at the other end of `stream` to the receiver that listens at `endpoint`,
    until the stream ends. PeerLost, ConnectError."""
    stream = claim(stream)
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def failed(error: PageferryError) -> None:
        if over.done():
            return
        if carriage.closed:  # as it is meant to end
            over.set_result(None)
        else:
            over.set_exception(error)

    probe(endpoint)
    carriage = Carriage(failed)
    try:
        await carriage.answer(stream, endpoint)
        await over
    finally:
        await to_its_end(carriage.close(hurry=True))


async def receive_many(destination: Reception, *, monitor: str | None = None) -> None:
    """Serve migrations at `destination`, several at a time, until cancelled."""
    async with AsyncExitStack() as stack:
        await _attach_monitor(stack, monitor, destination)
        await destination.serve()


async def receive_one(destination: Destination) -> dict[str, Any]:
    """One migration; its guest is concluded (a demo guest is checked) and let go."""
    report: dict[str, Any] | None = None
    error: PageferryError | None = None
    try:
        arrived = await destination.receive()
        assert destination.arrival is not None and destination.arrival.guest is not None
        report = arrived | await asyncio.to_thread(destination.arrival.guest.conclude)
        return report
    except PageferryError as e:
        error = e
        raise
    finally:
        arrival = destination.arrival
        if arrival is not None and arrival.guest is not None:
            # one that hangs would hold up the event loop
            await to_its_end(asyncio.to_thread(arrival.guest.close))
        destination.forget()
        if arrival is not None:
            tell(arrival.on_end, report, error)


def opener(
    into: GuestUri | None,
    qemu_command: str | None = None,
    index: ContentIndex | None = None,
    *,
    validate_uuid: bool = True,
) -> Callable[[Hello], DestinationGuest]:
    """What a Hello becomes here: `into`, or a VM in a QEMU that `qemu_command` starts, or without
    either what it is there.

    The peer never chooses a path: without `into`, memory goes to a new shared-memory file.
    `index`: of what came before; else of all that come by this opener. `validate_uuid`: a VM goes
    to none of another uuid.
    """
    index = index if index is not None else ContentIndex()

    def open_guest(hello: Hello) -> DestinationGuest:
        if qemu_command is not None:
            return start_qemu(qemu_command)
        if hello.kind == "qemu" and (into is None or into.kind != "qemu"):
            raise PeerRefused(
                "a VM is more than memory (processors, devices): start a QEMU that waits "
                "(-incoming defer) and receive --into qemu:QMP_SOCKET, or receive --qemu-command",
                field="kind",
            )
        if into is not None:
            return open_destination(into, index)
        if hello.kind == "demo":
            return open_destination(GuestUri("demo"))
        return open_destination(GuestUri("shm", f"pageferry-{hello.uuid}"))

    def open_and_tell(hello: Hello) -> DestinationGuest:
        guest = open_guest(hello)
        guest.validate_uuid = validate_uuid
        return guest

    return open_and_tell


async def copy(
    source: GuestUri,
    destination: GuestUri,
    parameters: Parameters,
    *,
    on_progress: Progress | None = None,
    on_started: Started | None = None,
    monitor: str | None = None,
    name: str = "",
    reserve: Reserve | None = None,
    index: ContentIndex | None = None,
    state: Sequence[Section] = (),
    state_there: Sequence[Section] = (),
    on_arrival: Callable[[Arrival], None] | None = None,
) -> dict[str, Any]:
    """Both ends on this host, each with its own coordinator and workers, over ipc. `reserve`,
    `state`: as in `send`; `index`: of what has come here before, if there was something;
    `state_there`: sections that `state` is loaded into; `on_arrival`: called with the other end.

    The sockets are in the abstract namespace: a crash leaves no file. Anybody on this host
    could connect to one, so the destination listens to nobody but our own source.
    """
    parameters = parameters.checked().on_this_host()
    check_sections(state)
    check_sections(state_there)
    check_destination(destination)
    _not_the_same(source, destination)
    warm_up()
    endpoint = Endpoint("ipc", path=f"@pageferry-{os.getpid()}-{secrets.token_hex(8)}")
    identity = secrets.token_bytes(16)
    listening = Destination(
        endpoint, opener(destination, index=index), only=identity, reserve=reserve
    )

    listening.sections, listening.on_arrival = tuple(state_there), on_arrival

    def attached(guest: SourceGuest) -> None:
        if isinstance(guest, SnapshotSource) and parameters.codec in ("none", "auto"):
            listening.here = guest.read_by_its_receiver()

    def receiver_cpu() -> float | None:
        return listening.arrival.receiver_cpu() if listening.arrival is not None else None

    try:
        arriving = asyncio.ensure_future(receive_one(listening))
        try:
            report = await send(
                source, endpoint, parameters, on_progress=on_progress, on_started=on_started,
                monitor=monitor, identity=identity, name=name, reserve=reserve,
                receiver_cpu=receiver_cpu, on_attached=attached, state=state,
            )  # fmt: skip
            return _merge(report, await arriving)
        except BaseException:
            if listening.arrival is None:
                arriving.cancel()
            elif listening.arrival.status in IN_POSTCOPY:
                listening.arrival.abandon(PeerLost("the source has given up"))
            # let the destination clean up: it was told
            await asyncio.gather(arriving, return_exceptions=True)
            raise
    finally:
        listening.close()


def _not_the_same(source: GuestUri, destination: GuestUri) -> None:
    """Memory moved onto itself would be cleared before it is read."""
    kinds = ("ram", "shm", "pid")
    if source.kind in kinds and destination.kind in kinds:
        same = False
        with contextlib.suppress(OSError, PageferryError):  # opening them says it better
            same = os.path.samefile(path_of(source), path_of(destination))
        if same:
            raise UsageError(f"{source} and {destination} are the same memory")


def _merge(report: dict[str, Any], arrived: dict[str, Any]) -> dict[str, Any]:
    """The source's report with what only the destination knows."""
    report["processes"] = [*report["processes"], *arrived["processes"][1:]]
    for name in ("oracle", "guest-latency", "postcopy-already-there"):
        if name in arrived:
            report[name] = arrived[name]
    return report


async def restore(
    source: GuestUri | Endpoint,
    uffd_socket: str,
    parameters: Parameters,
    *,
    on_progress: Progress | None = None,
    on_started: Callable[[Restoring], None] | None = None,
    monitor: str | None = None,
) -> dict[str, Any]:
    """Serve the monitor that connects at `uffd_socket` from a `pageferry serve`, or from an image
    here: then both ends are ours, as in `copy`."""
    warm_up()
    async with AsyncExitStack() as stack:
        identity = secrets.token_bytes(16)
        if isinstance(source, GuestUri):
            endpoint = Endpoint("ipc", path=f"@pageferry-{os.getpid()}-{secrets.token_hex(8)}")
            parameters = parameters.on_this_host()
            server = await open_server(stack, source, endpoint, parameters, only=identity)
            serving = asyncio.ensure_future(server.run())
            stack.push_async_callback(_end, serving)
        else:
            endpoint = source
        restoring = Restoring(endpoint, uffd_socket, on_progress, identity, parameters)
        if monitor is not None:
            where = await stack.enter_async_context(serve_monitor(monitor, restoring))
            restoring.on_event = where.emit
        if on_started is not None:
            on_started(restoring)
        return await restoring.run()


async def restore_into(
    source: GuestUri,
    into: GuestUri,
    parameters: Parameters,
    *,
    on_progress: Progress | None = None,
    on_started: Started | None = None,
    monitor: str | None = None,
) -> dict[str, Any]:
    """A guest of a snapshot that is here, from now on `into`: a copy of memory that nobody writes.
    With `parameters.postcopy` it runs at once and its memory comes behind: a pause is recovered
    from at once, a few times; if the snapshot cannot be read it is given up, since nobody else has
    its memory: PostcopyFailed."""
    if source.kind not in ("file", "image"):
        raise UsageError(f"{source} is no snapshot: restore --into takes file:PATH (or image:PATH)")
    begun: list[Source] = []
    arrived: list[Arrival] = []
    tries, why = _RECOVERIES, ""

    def started(migration: Source | Destination) -> None:
        if isinstance(migration, Source):
            begun.append(migration)
        if on_started is not None:
            on_started(migration)

    def progress(report: dict[str, Any]) -> None:
        nonlocal tries, why
        if on_progress is not None:
            on_progress(report)
        if report["status"] != Status.POSTCOPY_PAUSED.value or not begun or why:
            return
        # either end reads the snapshot, and the other one hears of it as of any pause
        reasons = [begun[0].paused_by, *(arrival.paused_by for arrival in arrived)]
        final = [r for r in reasons if isinstance(r, VerificationFailed | SourceError)]
        if tries and not final:
            tries -= 1
            begun[0].recover(None)
        else:
            why = str((final or reasons)[0])
            begun[0].cancel()

    try:
        return await copy(
            source, into, parameters, on_progress=progress, on_started=started, monitor=monitor,
            on_arrival=arrived.append,
        )  # fmt: skip
    except PageferryError as e:
        if not why:
            raise
        raise PostcopyFailed(
            f"the guest was started and is given up, its memory cannot be brought: {why}", **e.data
        ) from e


async def snapshot(
    source: GuestUri,
    into: GuestUri,
    *,
    workers: int = 0,
    live: bool = False,
    on_progress: Progress | None = None,
    on_started: Callable[[Snapshot], None] | None = None,
    monitor: str | None = None,
    on_attached: Callable[[SourceGuest], None] | None = None,
) -> dict[str, Any]:
    """Save `source` as it is at one instant to the file `into` (file:PATH); it goes on, with `live`
    all the time but for some milliseconds. `on_attached`: as in `send`; the file is made by whoever
    this process is then."""
    if into.kind != "file":
        raise UsageError(f"{into} is no file for a snapshot: write file:PATH")
    if source.kind == "file":
        raise UsageError(f"{source} is a snapshot already: copy the file")
    if source.kind in ("pid", "qemu"):  # its writes need not be known
        source = replace(source, options=source.options | {"tracking": TRACKING_HASH})
    direct = into.choice("direct", ("on", "off")) == "on"
    count = Parameters(workers=workers).checked().workers
    if on_attached is None:
        warm_up()
    guest = await _opened(source)
    report: dict[str, Any] | None = None
    try:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(lambda: to_its_end(asyncio.to_thread(guest.close)))
            taking = Snapshot(
                guest, into.rest, count, live=live, direct=direct, on_progress=on_progress
            )  # fmt: skip
            stack.push_async_callback(lambda: to_its_end(taking.close()))
            if on_attached is not None:
                await taking.attach()
                on_attached(guest)
                warm_up()
            if monitor is not None:
                where = await stack.enter_async_context(serve_monitor(monitor, taking))
                taking.on_event = where.emit
            if on_started is not None:
                on_started(taking)
            report = await taking.run()
    except asyncio.CancelledError:
        if report is None:
            raise  # else it came too late: the file is there
    assert report is not None
    return report


async def _end(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def open_server(
    stack: AsyncExitStack,
    source: GuestUri,
    endpoint: Endpoint,
    parameters: Parameters,
    on_end: Callable[[str, dict[str, Any] | None, PageferryError | None], None] | None = None,
    only: bytes | None = None,
) -> Server:
    """A server of the image `source`, open until `stack` ends."""
    if source.kind not in ("image", "file"):
        raise UsageError(f"{source} is no snapshot: only image: and file: are served")
    warm_up()
    guest = await asyncio.to_thread(open_source, source)
    stack.callback(guest.close)
    server = Server(endpoint, guest, parameters, on_end, only)
    stack.callback(server.close)
    return server


async def migrate_async(
    source: str,
    destination: str,
    *,
    on_progress: Progress | None = None,
    on_started: Started | None = None,
    monitor: str | None = None,
    trace: str | None = None,
    profile: str | None = None,
    state: Sequence[Section] = (),
    state_there: Sequence[Section] = (),
    **parameters: Any,
) -> dict[str, Any]:
    """Migrate `source` to `destination`; returns the report (query-migrate's names). `profile`: a
    name or a path (profiles.py); what `parameters` say comes before what it says. `trace`: the file
    that trace events are written to. `state`, and if both ends are here `state_there`: see `copy`.

    `on_progress(report)` is called four times a second. Raises PageferryError's subclasses;
    an error's `data["report"]`, where it is there, has the figures up to then.
    """
    if profile is not None:
        from .profiles import parameters_of  # who uses none does not wait for it

        parameters = parameters_of(profile, parameters)
    checked = Parameters(**parameters).checked()
    where = parse_guest(source)
    how = {"on_progress": on_progress, "on_started": on_started, "monitor": monitor}
    if destination.startswith(("tcp://", "ipc://")) or is_stream(destination):
        there = parse_target(destination)
        with recording(trace, where):
            return await send(where, there, checked, state=state, **how)  # type: ignore[arg-type]
    into = parse_guest(destination)
    with recording(trace, where, into):
        return await copy(
            where, into, checked, state=state, state_there=state_there, **how,  # type: ignore[arg-type]
        )  # fmt: skip


def migrate(source: str, destination: str, **parameters: Any) -> dict[str, Any]:
    """`migrate_async`, for programs without an event loop."""
    return asyncio.run(migrate_async(source, destination, **parameters))


async def plan_async(
    source: str,
    endpoint: str | None = None,
    *,
    seconds: float = 2.0,
    sample: int = 128 << 20,
    profile: str | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """Whether `source` would converge, in what time, and how it should be moved: to the receiver at
    `endpoint`, or as if both ends were here. The report of `pageferry plan --json`
    (docs/planning.md): times in milliseconds, rates in bytes a second.

    Its writes are looked at for `seconds`, twice, and `sample` bytes of it are moved and thrown
    away; it is neither stopped nor changed. `profile`, `parameters`: as of `migrate_async`; what
    counts is max_bandwidth (the link's), downtime_limit, max_rounds, workers (0: as many as pay),
    codec, level, batch_pages, and keys. Raises PageferryError's subclasses.
    """
    from .planning import plan, wanted_by  # who only migrates does not wait for it

    if profile is not None:
        from .profiles import parameters_of

        parameters = parameters_of(profile, parameters)
    wanted = wanted_by(Parameters(**parameters), seconds, sample)
    there = None if endpoint is None else parse_endpoint(endpoint)
    return await plan(parse_guest(source), there, wanted)


def plan(source: str, endpoint: str | None = None, **how: Any) -> dict[str, Any]:
    """`plan_async`, for programs without an event loop."""
    return asyncio.run(plan_async(source, endpoint, **how))


async def dirty_rate_async(
    source: str, *, seconds: float = 1.0, mode: str = "", sample_pages: int = 0
) -> dict[str, Any]:
    """How fast `source` is written: query-dirty-rate (docs/planning.md). `mode`: page-sampling,
    with `sample_pages` a GiB (0: the default), or dirty-bitmap; "" for what can be. It is neither
    stopped nor changed. Raises PageferryError's subclasses."""
    from .dirty_rate import Asked
    from .measuring import dirty_rate

    return await dirty_rate(parse_guest(source), Asked(seconds, mode, sample_pages))


def dirty_rate(source: str, **how: Any) -> dict[str, Any]:
    """`dirty_rate_async`, for programs without an event loop."""
    return asyncio.run(dirty_rate_async(source, **how))
