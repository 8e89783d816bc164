"""What a batch is to do, as people write it: TOML, YAML or JSON, or just some images. The format is
docs/batch.md.

    parallel = 4
    defaults = {codec = "zstd"}
    [[items]]
    source = "image:vm1.mem"
    destination = "tcp://192.0.2.7:4444"

Text goes in, checked items come out; an error names the item and the field. Of the file system it
knows the manifest, and the names of images; no clock, no socket, no process.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from ..transport.errors import HostLacks, UsageError
from ..transport.links import parse_endpoint
from ..transport.quantities import parse_duration, parse_rate, parse_size
from ..workers.guests import GuestUri, check_destination, is_directory, parse_guest
from ..workers.guests.image_directory import IMAGE_NAME
from .parameters import NEVER, Parameters
from .planner import HostLimit, Limits, Task

# Each has processes and descriptors at both ends.
MAX_PARALLEL = 256
MAX_RETRIES = 1000
# With the default of `backoff`, together at least 7 s: a receiver holds what it had of a peer that
# was killed for 4 s, and takes nothing else in its place.
DEFAULT_RETRIES = 3
# What a receiver of many takes for a file's name (workers/guests/image_directory.py).
# What this host is called in `hosts`.
LOCAL = "local"
# dask takes a list of NAME=AMOUNT with commas and spaces in between.
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ADDRESSES = ("tcp://", "ipc://")
_WITH_PATHS = ("image", "file", "ram", "qemu")
_FORMS = {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML", ".json": "JSON"}

# 10Gbit, 500MB; a number is bytes a second. 300ms, 2s; a number is milliseconds.
Rate = str | int
Duration = str | int


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """What an item may say of its migration: the options of `pageferry copy`, by their names. None:
    not said."""

    workers: int | None = None
    codec: str | None = None
    level: int | None = None
    downtime_limit: Duration | None = None
    max_rounds: int | None = None
    xbzrle_cache_size: str | int | None = None
    verify: bool | None = None
    batch_pages: int | None = None
    postcopy: str | None = None
    preempt: bool | None = None
    max_postcopy_bandwidth: Rate | None = None
    postcopy_latency_target: Duration | None = None
    postcopy_link: str | None = None
    quit_source: bool | None = None
    goal: str | None = None
    keys: str | None = None
    peer: str | None = None
    insecure: bool | None = None
    auto_converge: bool | None = None
    dirty_limit: bool | None = None
    cpu_throttle_initial: int | None = None
    cpu_throttle_increment: int | None = None
    cpu_throttle_tailslow: bool | None = None
    max_cpu_throttle: int | None = None
    throttle_trigger_threshold: int | None = None
    vcpu_dirty_limit: Rate | None = None
    vcpu_dirty_limit_period: Duration | None = None


class _Defaults(Settings, frozen=True, kw_only=True):
    """What `defaults` may say."""

    host: str | list[str] | None = None


class _Item(_Defaults, frozen=True, kw_only=True):
    """An item as it is written."""

    source: str
    destination: str
    name: str | None = None
    priority: int = 0
    max_bandwidth: Rate = 0
    retries: int | None = None


class _Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    max_bandwidth: Rate = 0
    parallel: int = 0


class _Top(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A manifest as it is written. Items are decoded one by one, so that an error can name them."""

    items: list[dict[str, Any]]
    destination: str | None = None
    parallel: int | None = None
    parallel_per_destination: int = 0
    max_bandwidth: Rate | None = None
    retries: int | None = None
    backoff: Duration | None = None
    max_backoff: Duration | None = None
    defaults: dict[str, Any] = {}
    hosts: dict[str, dict[str, Any]] = {}


class Item(msgspec.Struct, frozen=True):
    """One thing to move, checked. `name`: what it is called, and what its file is called at a
    receiver of many; `source`, `destination`: URIs, paths in them absolute; `max_bandwidth`: bytes
    a second, 0 without limit; `retries`: how often it is tried again; `settings`: what its
    migration is to be like; `hosts`: where its source is, any of them will do; empty if here."""

    name: str
    source: str
    destination: str
    priority: int = 0
    max_bandwidth: int = 0
    retries: int = 0
    settings: Settings = Settings()
    hosts: tuple[str, ...] = ()

    @property
    def guest(self) -> GuestUri:
        return parse_guest(self.source)

    @property
    def to_receiver(self) -> bool:
        """It goes to a `pageferry receive`; else both ends are where its source is."""
        return self.destination.startswith(_ADDRESSES)

    @property
    def host(self) -> str:
        """Where it goes: the host of its endpoint, or that of its source, "local" if that is this
        host."""
        endpoint = parse_endpoint(self.destination) if self.to_receiver else None
        if endpoint is not None and endpoint.scheme == "tcp":
            return endpoint.host
        return self.source_host

    @property
    def source_host(self) -> str:
        """The first of its hosts, "local" if it is here."""
        return self.hosts[0] if self.hosts else LOCAL

    @property
    def alike(self) -> bool:
        """Others that go there may be much the same, and then what is equal travels once: images,
        to a receiver (which may be one of many) or a directory. Only if they are here, to be
        looked at."""
        if self.guest.kind != "image" or self.hosts:
            return False
        return self.to_receiver or is_directory(parse_guest(self.destination))

    def parameters(self) -> Parameters:
        """Of its migration; UsageError that names the parameter."""
        return _parameters(self.settings, self.max_bandwidth)


class Policy(msgspec.Struct, frozen=True):
    """How a batch goes about it. Rates in bytes a second, 0 without limit; times in seconds."""

    parallel: int = 4
    parallel_per_destination: int = 0
    max_bandwidth: int = 0
    backoff: float = 2.0
    max_backoff: float = 60.0
    hosts: dict[str, tuple[int, int]] = {}  # max-bandwidth, parallel

    def limits(self) -> Limits:
        return Limits(
            self.parallel, self.max_bandwidth, 0, self.parallel_per_destination,
            {host: HostLimit(*both) for host, both in self.hosts.items()},
            self.backoff, self.max_backoff,
        )  # fmt: skip


class Manifest(msgspec.Struct, frozen=True):
    """A batch, checked."""

    policy: Policy
    items: list[Item]


def task(number: int, item: Item, failures: int = 0) -> Task:
    """An item as the planner sees it."""
    return Task(
        number, item.name, item.source_host, item.host, item.priority, item.max_bandwidth,
        item.retries, failures, item.alike,
    )  # fmt: skip


def _parameters(settings: Settings, max_bandwidth: int) -> Parameters:
    said = {
        name: value
        for name in Settings.__struct_fields__
        if (value := getattr(settings, name)) is not None
    }
    for name in ("downtime_limit", "postcopy_latency_target", "vcpu_dirty_limit_period"):
        if name in said:
            said[name] = _read(name, parse_duration, said[name])
    for name in ("max_postcopy_bandwidth", "vcpu_dirty_limit"):
        if name in said:
            said[name] = _read(name, parse_rate, said[name])
    if "xbzrle_cache_size" in said:
        size = said["xbzrle_cache_size"]
        said["xbzrle_cache_size"] = _read("xbzrle_cache_size", parse_size, size)
    return Parameters(max_bandwidth=max_bandwidth, **said)


def settings_of(data: Any, where: str) -> Settings:
    """Plain data as settings; UsageError that begins with `where` and names the field."""
    found: Settings = _decode(data, Settings, where)
    return found


def told(settings: Settings, where: str) -> Parameters:
    """Settings alone as parameters; UsageError that begins with `where`."""
    found: Parameters = _at(where, "", lambda: _parameters(settings, 0).checked())
    return found


# ---- from files ------------------------------------------------------------------------------


def load(what: str, destination: str | None, given: Mapping[str, Any] | None = None) -> Manifest:
    """A manifest from the file `what`; or of images, if `what` is a directory, a pattern or a file
    that is no manifest. `destination`: of items that name none. `given`: what somebody said
    elsewhere, by the names of the top level and of `defaults`; it stands above both, and below what
    an item says itself. UsageError; HostLacks where YAML cannot be read."""
    found = _load(what, destination, given)
    for item in found.items:
        to = None if item.to_receiver or item.hosts else parse_guest(item.destination)
        if to is not None and to.kind == "image" and not os.path.isdir(os.path.dirname(to.rest)):
            raise UsageError(
                f"item {item.name!r}: destination: there is no directory {os.path.dirname(to.rest)}"
            )
    return found


def _load(what: str, destination: str | None, given: Mapping[str, Any] | None) -> Manifest:
    form = _FORMS.get(os.path.splitext(what)[1].lower())
    if form is not None and not os.path.isdir(what):
        try:
            with open(what, "rb") as file:
                text = file.read()
        except OSError as e:
            raise UsageError(f"cannot read the manifest {what}: {e.strerror}") from e
        return parse(text, form, os.path.dirname(os.path.abspath(what)), destination, given)
    if destination is None:
        raise UsageError(
            f"{what} is no manifest (.toml, .yaml, .json): to move images, say where to: "
            f"tcp://HOST:PORT or image:DIR/"
        )
    items = [{"source": f"image:{path}"} for path in images(what)]
    return manifest({"items": items}, os.getcwd(), destination, given)


def images(what: str) -> list[str]:
    """Files by a pattern, or all of a directory but hidden ones; sorted. UsageError if none is."""
    if os.path.isdir(what):
        paths: Iterable[str] = (os.path.join(what, name) for name in os.listdir(what))
        found = [path for path in paths if not os.path.basename(path).startswith(".")]
    elif os.path.exists(what):  # a name may look like a pattern
        found = [what]
    else:
        found = glob.glob(what, recursive=True)
    found = sorted(path for path in found if os.path.isfile(path))
    if not found:
        raise UsageError(f"{what}: no image is there")
    return found


def parse(
    text: bytes,
    form: str,
    folder: str,
    destination: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Manifest:
    """A manifest from its text. `form`: TOML, YAML or JSON; `folder`: where relative paths begin;
    the rest as in `load`."""
    try:
        data = _decoder(form)(text.decode())
    except UsageError:
        raise
    except (ValueError, RecursionError) as e:  # all of the parsers' errors, and of decode()
        raise UsageError(f"the manifest is no {form}: {' '.join(str(e).split())}") from e
    return manifest(data, folder, destination, given)


def _decoder(form: str) -> Callable[[str], Any]:
    if form == "TOML":
        return tomllib.loads
    if form == "JSON":
        return json.loads
    try:
        import yaml
    except ImportError as e:
        raise HostLacks(
            "a manifest in YAML needs PyYAML: pip install 'pageferry[yaml]', or write TOML or JSON"
        ) from e

    def load_yaml(text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ValueError(str(e)) from e

    return load_yaml


# ---- from data -------------------------------------------------------------------------------


def manifest(
    data: Any,
    folder: str,
    destination: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Manifest:
    """Plain data, checked. The arguments are those of `parse`."""
    if not isinstance(data, dict):
        raise UsageError("the manifest must be a table with the list `items`")
    given = dict(given or {})
    own = {name: given.pop(name) for name in _TOP_NAMES & set(given)}
    top = _decode(data | own, _Top, "the manifest")
    if not top.items:
        raise UsageError("the manifest: items: there is none")
    defaults = top.defaults | given
    _decode(defaults, _Defaults, "the manifest: defaults")
    items = []
    for number, raw in enumerate(top.items, 1):
        where = f"item {number}"
        if isinstance(raw.get("name"), str):
            where = f"item {raw['name']!r}"
        to = destination or top.destination
        base = {"destination": to} if to is not None else {}
        retries = DEFAULT_RETRIES if top.retries is None else top.retries
        items.append(_item(base | _merged(defaults, raw), where, folder, retries))
    _check_unique(items)
    return Manifest(_policy(top), items)


_TOP_NAMES = {"parallel", "max-bandwidth", "retries", "backoff", "max-backoff"}


def _decode(data: Any, kind: type[Any], where: str) -> Any:
    """Strictly: a number in quotes is no number. msgspec's words, and where it is."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as e:
        text, _, path = str(e).partition(" - at `")
        field = path.rstrip("`").removeprefix("$").removeprefix(".")
        text = text.removeprefix("Object ").removeprefix("contains ")
        raise UsageError(f"{where}: {field + ': ' if field else ''}{_lower(text)}") from e


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _merged(defaults: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """A level belongs to its codec: an item with a codec of its own has its own or none."""
    if "codec" in raw:
        defaults = {name: value for name, value in defaults.items() if name != "level"}
    return defaults | raw


def _item(data: dict[str, Any], where: str, folder: str, retries: int) -> Item:
    raw: _Item = _decode(data, _Item, where)
    hosts = _at(where, "host", lambda: _hosts(raw.host))
    source = _at(where, "source", lambda: anchored(raw.source, "" if hosts else folder))
    guest = _at(where, "source", lambda: parse_guest(source))
    name = raw.name if raw.name is not None else _name_of(guest, where)
    where = f"item {name!r}"
    _at(where, "name", lambda: check_name(name))
    where_to = raw.destination
    if hosts:
        _at(where, "source", lambda: _check_absolute(source))
        _at(where, "destination", lambda: _check_absolute(where_to))
    to = _at(where, "destination", lambda: _destination(where_to, folder, hosts))
    settings = Settings(**{f: getattr(raw, f) for f in Settings.__struct_fields__})
    if settings.keys:
        if hosts and not os.path.isabs(settings.keys):
            raise UsageError(f"{where}: keys: at another host a path must be absolute")
        keys = os.path.join(folder, settings.keys)
        settings = msgspec.structs.replace(settings, keys=keys)
    item = Item(
        name=name,
        source=source,
        destination=to,
        priority=_within(where, "priority", raw.priority, -(1 << 31), (1 << 31) - 1),
        max_bandwidth=_at(where, "", lambda: _read("max_bandwidth", parse_rate, raw.max_bandwidth)),
        retries=_within(
            where, "retries", retries if raw.retries is None else raw.retries, 0, MAX_RETRIES
        ),
        settings=settings,
        hosts=hosts,
    )
    parameters = _at(where, "", lambda: item.parameters().checked())
    if guest.kind == "image" and parameters.postcopy != NEVER:
        raise UsageError(f"{where}: postcopy: nothing runs in an image")
    if len(hosts) > 1 and guest.kind != "image":
        raise UsageError(
            f"{where}: host: a guest runs at one host; only an image may be at several"
        )
    return item


def _hosts(said: str | list[str] | None) -> tuple[str, ...]:
    """Each one that can be in the name of a dask resource; none for `local`."""
    if said is None or said == LOCAL:
        return ()
    names = [said] if isinstance(said, str) else said
    for name in names:
        check_host(name)
    if not names or len(set(names)) < len(names):
        raise UsageError("it must be a name, or several different ones")
    return tuple(names)


def check_host(name: str) -> None:
    """UsageError, unless it can be what a host of a fleet is called."""
    if not _HOST_NAME.fullmatch(name) or name == LOCAL:
        raise UsageError(f"{name[:80]!r} names no host: letters, digits, . _ - and not {LOCAL!r}")


def _check_absolute(uri: str) -> None:
    """Nobody knows where a relative path would begin at another host."""
    kind, _, path = uri.partition(":")
    path = path.removeprefix("//") if kind == "ipc" else path
    if kind in (*_WITH_PATHS, "ipc") and not path.startswith(("/", "@")):
        raise UsageError(f"{uri}: at another host a path must be absolute")


def _at(where: str, field: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UsageError as e:
        raise UsageError(f"{where}: {field + ': ' if field else ''}{e.message}") from e


def _read(name: str, parser: Callable[[str], Any], value: str | int) -> Any:
    return _at(name.replace("_", "-"), "", lambda: parser(str(value)))


def _within(where: str, field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise UsageError(f"{where}: {field} must be from {low} to {high}, not {value}")
    return value


def anchored(uri: str, folder: str) -> str:
    """`uri` with its path absolute: it means the same wherever the batch is taken up again."""
    if uri.startswith("ipc://"):
        path = uri[6:]
        return uri if path.startswith("@") or not path else f"ipc://{os.path.join(folder, path)}"
    kind, _, path = uri.partition(":")
    return f"{kind}:{os.path.join(folder, path)}" if kind in _WITH_PATHS and path else uri


def _destination(text: str, folder: str, hosts: tuple[str, ...]) -> str:
    """`hosts`: where it is, unless it is a receiver's address."""
    uri = anchored(text, "" if hosts else folder)
    if uri.startswith(_ADDRESSES):
        return str(parse_endpoint(uri))
    guest = parse_guest(uri)
    check_destination(guest)
    if guest.kind == "image" and not (hosts or is_directory(guest)) and os.path.isdir(guest.rest):
        return f"{guest}/"
    return str(guest)


def _name_of(guest: GuestUri, where: str) -> str:
    """The file name of what has one."""
    name = os.path.basename(guest.rest.rstrip("/"))
    if guest.kind == "pid":
        name = f"pid-{guest.rest}"
    if not name:
        raise UsageError(f"{where}: name: {guest} has no file name: give it one")
    return name


def check_name(name: str) -> None:
    """UsageError, unless it can be a file's name in somebody else's directory."""
    if not IMAGE_NAME.fullmatch(name):
        raise UsageError(
            f"{name[:64]!r} is no name for an image: letters, digits, . _ + @ = , - and no path"
        )


def _check_unique(items: list[Item]) -> None:
    """Two items that arrive in one place would replace each other."""
    seen: dict[tuple[str, str, str], int] = {}
    for number, item in enumerate(items, 1):
        place = (item.host, item.destination, item.name)
        if not item.to_receiver:
            guest = parse_guest(item.destination)
            if is_directory(guest):
                place = (item.host, f"{item.destination}{item.name}", "")
            elif guest.kind != "demo":  # each of these is a new one
                place = (item.host, item.destination, "")
        if place in seen:
            what = (
                f"items {seen[place]} and {number} would replace each other at {item.destination}"
            )
            if item.to_receiver or item.destination.endswith("/"):
                raise UsageError(f"{what}: both are called {item.name!r}; give one another name")
            raise UsageError(f"{what}: for a directory, write image:DIR/")
        seen[place] = number


def changed(policy: Policy, parallel: int | None, max_bandwidth: Rate | None) -> Policy:
    """`policy` with what somebody wants otherwise; UsageError."""
    where = "the batch"
    if parallel is not None:
        _within(where, "parallel", parallel, 1, MAX_PARALLEL)
        policy = msgspec.structs.replace(policy, parallel=parallel)
    if max_bandwidth is not None:
        policy = msgspec.structs.replace(policy, max_bandwidth=_rate(max_bandwidth, where))
    return policy


def _rate(value: Rate, where: str) -> int:
    """One that migrations take."""
    found = int(_at(where, "", lambda: _read("max_bandwidth", parse_rate, value)))
    _at(where, "", lambda: Parameters(max_bandwidth=found).checked())
    return found


def _policy(top: _Top) -> Policy:
    where = "the manifest"

    def seconds(name: str, value: Duration | None, default: float) -> float:
        if value is None:
            return default
        found = float(_at(where, "", lambda: _read(name, parse_duration, value)))
        if found <= 0:
            raise UsageError(f"{where}: {name.replace('_', '-')} must be more than nothing")
        return found

    _within(where, "retries", top.retries or 0, 0, MAX_RETRIES)
    hosts = {}
    for host, raw in top.hosts.items():
        at = f"{where}: hosts.{host}"
        limit: _Host = _decode(raw, _Host, at)
        parallel = _within(at, "parallel", limit.parallel, 0, MAX_PARALLEL)
        hosts[host] = (_rate(limit.max_bandwidth, at), parallel)
    default = Policy()
    return Policy(
        parallel=_within(
            where, "parallel", default.parallel if top.parallel is None else top.parallel, 1,
            MAX_PARALLEL,
        ),
        parallel_per_destination=_within(
            where, "parallel-per-destination", top.parallel_per_destination, 0, MAX_PARALLEL
        ),
        max_bandwidth=_rate(top.max_bandwidth or 0, where),
        backoff=seconds("backoff", top.backoff, default.backoff),
        max_backoff=seconds("max_backoff", top.max_backoff, default.max_backoff),
        hosts=hosts,
    )  # fmt: skip
