"""The architecture, enforced: who may import whom, who may open sockets and make system calls."""

import ast
from pathlib import Path

import pytest

import pageferry

ROOT = Path(pageferry.__file__).resolve().parent
# Each folder may import those before it and itself, never those behind it.
LAYERS = ("transport", "workers", "pipeline", "tools")
# What anybody may import of the root.
SHARED = {"_version"}

# No clock, no socket, no process, no log: what is in here is tested without any of them.
SANS_IO = {
    *(f"transport/{name}.py" for name in ("wire", "channel", "session", "messages", "pages")),
    *(f"transport/{name}.py" for name in ("errors", "quantities", "urgent", "__init__")),
    "transport/codecs/__init__.py",
    "transport/curve.py",
    "transport/strangers.py",
    *(f"transport/{name}.py" for name in ("streams", "stream_addresses")),
    "transport/snapshot_format.py",
    "transport/codecs/choice.py",
    "transport/codecs/xbzrle.py",
    *(f"transport/vmstate/{name}.py" for name in ("coding", "description", "kinds", "layout")),
    *(f"transport/vmstate/{name}.py" for name in ("reading", "stream", "__init__")),
    *(f"pipeline/{name}.py" for name in ("migration", "state", "convergence", "partition")),
    "pipeline/throttling.py",
    *(f"pipeline/{name}.py" for name in ("agreement", "pacing", "parameters", "__init__")),
    *(f"pipeline/{name}.py" for name in ("planner", "families", "narration", "trace_events")),
    "workers/trace_records.py",
    "pipeline/fleet_attempt.py",
    "pipeline/device_state.py",
    "pipeline/qemu_stream.py",
    *(f"pipeline/{name}.py" for name in ("tuning", "tuning_report", "bounds", "goals")),
    *(f"pipeline/{name}.py" for name in ("dirty_rate", "plan", "plan_report", "stalls")),
    *(f"tools/report/{name}.py" for name in ("record", "charts", "style", "sections", "__init__")),
    *(f"tools/report/{name}.py" for name in ("page", "batch_page")),
    *(f"tools/web/{name}.py" for name in ("address", "board", "views", "__init__")),
    "_version.py",
}
IO_MODULES = {
    "asyncio", "concurrent", "datetime", "logging", "multiprocessing", "select", "selectors",
    "signal", "socket", "ssl", "subprocess", "threading", "time", "zmq",
}  # fmt: skip

# Who may import the socket module: links and the direct one, who looks at connections, the handover
# of descriptors over a unix socket, what the service manager is told, and what a stream carries.
SOCKET_MODULES = {
    "transport/links.py", "workers/guests/handover.py", "workers/guests/qmp.py",
    "workers/leash.py", "transport/doorkeeper.py", "transport/direct.py", "tools/cli/service.py",
    "transport/carrier.py",
}  # fmt: skip
OPENING = {"socket", "bind", "connect"}
# The monitor's unix socket is a stream of asyncio's; the live view is HTTP.
STREAM_MODULES = {"pipeline/monitor.py", "tools/web/server.py"}
STREAMS = {
    "start_server", "start_unix_server", "open_connection", "open_unix_connection",
    "create_server", "create_unix_server", "create_connection", "create_unix_connection",
}  # fmt: skip
# Objects that are made of bytes: by a process from its own parent, over the socket pair that it was
# born with, and by nobody else.
PICKLING = {"pickle", "_pickle", "marshal", "shelve", "cloudpickle", "dill", "jsonpickle"}
PICKLING_MODULES = {"workers/leash.py"}
PICKLED = {"recv_pyobj", "send_pyobj"}
SYSTEM_CALLS = {"ctypes", "fcntl", "_ctypes"}
# What a batch has done is in one file, and one module knows how.
DATABASE_MODULES = {"pipeline/batch_state.py"}
# Whoever has no fleet needs no dask.
DASK_MODULES = {"pipeline/fleet.py"}
# Builds networks and talks to other tools; nothing of pageferry runs in it.
BENCHMARK = "tools/bench/"
# Loading by name: the lazy package and the command line's table of commands.
LOADING_MODULES = {"__init__.py", "tools/cli/main.py"}


def files():
    """All modules of the package, by their path below the root."""
    found = {}
    for path in sorted(
        [*ROOT.glob("*.py"), *(p for d in LAYERS for p in ROOT.glob(f"{d}/**/*.py"))]
    ):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("tools/typing_root/"):
            found[name] = ast.parse(path.read_text(), name)
    return found


def imports(name, tree):
    """Everything that `tree` imports, absolute: "pageferry.transport.wire", "zmq.asyncio", …"""
    package = ["pageferry", *Path(name).parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            assert base, f"{name}: an import from above the package"
            # a name may be a module or something in one: both are looked at
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def ours(imported):
    """The part of the package that is imported ("transport", "_version"), None if it is not."""
    parts = imported.split(".")
    return (parts[1] if len(parts) > 1 else "") if parts[0] == "pageferry" else None


def wrong_direction(name, tree):
    """What a file imports from a folder behind its own."""
    folder = Path(name).parts[0]
    if folder not in LAYERS:
        return set()  # the root is above all of them
    allowed = {*LAYERS[: LAYERS.index(folder) + 1], *SHARED}
    return {i for i in imports(name, tree) if ours(i) is not None and ours(i) not in allowed}


def io(name, tree):
    """What a file that must be pure imports and may not: I/O, or a module of ours that is not."""
    found = set()
    for imported in imports(name, tree):
        if imported.split(".")[0] in IO_MODULES:
            found.add(imported)
        if ours(imported) is not None:
            path = imported.split(".")[1:]
            candidates = ["/".join(path), "/".join(path[:-1])]
            options = {f"{c}.py" for c in candidates} | {f"{c}/__init__.py" for c in candidates}
            if not options & SANS_IO:
                found.add(imported)
    return found


def calls(tree):
    """Names of all methods and functions that are called."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in functions}


def method_calls(tree):
    """Names of all methods that are called on something."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.attr for f in functions if isinstance(f, ast.Attribute)}


def roots(name, tree):
    return {imported.split(".")[0] for imported in imports(name, tree)}


def opens_sockets(name, tree):
    """What a file does that only links.py may do."""
    found = set()
    if "socket" in roots(name, tree) and name not in SOCKET_MODULES:
        found.add("import socket")
    if "zmq" in roots(name, tree) and name != "transport/links.py":
        found |= method_calls(tree) & OPENING
    if name not in STREAM_MODULES:
        found |= calls(tree) & STREAMS if "asyncio" in roots(name, tree) else set()
    return found


def pickles(name, tree):
    """What makes objects of bytes that came from somewhere."""
    return (roots(name, tree) & PICKLING) | (method_calls(tree) & PICKLED)


MODULES = files()


def everywhere(check, names=None):
    """The files in which `check` finds something, with what it finds."""
    found = {name: check(name, MODULES[name]) for name in (names or MODULES)}
    return {name: what for name, what in found.items() if what}


def test_all_files_are_looked_at():
    """Or the rest of this file would pass over nothing."""
    assert {Path(name).parts[0] for name in MODULES if "/" in name} == set(LAYERS)
    assert set(MODULES) >= SANS_IO | SOCKET_MODULES | STREAM_MODULES | LOADING_MODULES
    assert len(MODULES) > 40


def test_imports_go_one_way():
    """tools -> pipeline -> workers -> transport, and never back."""
    assert everywhere(wrong_direction) == {}


def test_the_pure_modules_are_pure():
    """No I/O, and nothing of ours that has any."""
    assert everywhere(io, SANS_IO) == {}


def test_only_links_opens_sockets():
    """Others get theirs from there."""
    names = [name for name in MODULES if not name.startswith(BENCHMARK)]
    assert everywhere(opens_sockets, names) == {}


def test_no_pickle_on_any_socket():
    """What comes from a peer is numbers, strings and bytes."""
    names = [name for name in MODULES if name not in PICKLING_MODULES]
    assert everywhere(pickles, names) == {}


def test_only_the_kernel_folder_makes_system_calls():
    """ioctls, ctypes and everything else that needs a SAFETY comment."""
    names = [name for name in MODULES if not name.startswith(("workers/kernel/", BENCHMARK))]
    assert everywhere(lambda name, tree: roots(name, tree) & SYSTEM_CALLS, names) == {}


def test_only_the_state_of_a_batch_is_a_database():
    """Others ask it."""
    names = [name for name in MODULES if name not in DATABASE_MODULES]
    assert everywhere(lambda name, tree: roots(name, tree) & {"sqlite3"}, names) == {}


def test_only_the_fleet_imports_dask():
    """And at no import of ours: it may not be there, and takes a second."""
    names = [name for name in MODULES if name not in DASK_MODULES]
    assert everywhere(lambda name, tree: roots(name, tree) & {"dask", "distributed"}, names) == {}
    (tree,) = (MODULES[name] for name in DASK_MODULES)
    tops = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not roots("pipeline/fleet.py", ast.Module(tops, [])) & {"dask", "distributed"}


def test_nobody_imports_by_name_what_he_could_not_import():
    """import_module would be a way around these rules."""
    loading = {"import_module", "__import__", "exec_module"}
    names = [name for name in MODULES if name not in LOADING_MODULES]
    assert everywhere(lambda name, tree: calls(tree) & loading, names) == {}


@pytest.mark.parametrize(
    ("check", "name", "source", "found"),
    [
        (wrong_direction, "transport/x.py", "from ..workers import jobs", {"workers.jobs"}),
        (wrong_direction, "workers/guests/x.py", "from ...pipeline import api", {"pipeline.api"}),
        (wrong_direction, "pipeline/x.py", "import pageferry.tools.cli", {"tools.cli"}),
        (wrong_direction, "pipeline/x.py", "from .. import tools", {"tools"}),
        (wrong_direction, "workers/x.py", "def f():\n    from .. import migrate", {"migrate"}),
        (wrong_direction, "workers/x.py", "from ..transport import wire\nfrom . import y", set()),
        (wrong_direction, "pipeline/x.py", "from .._version import __version__", set()),
        (io, "pipeline/x.py", "import time", {"time"}),
        (io, "pipeline/x.py", "def f():\n    from asyncio import sleep", {"asyncio.sleep"}),
        (io, "pipeline/x.py", "from .control import Control", {"pipeline.control.Control"}),
        (io, "pipeline/x.py", "from ..transport.links import bind", {"transport.links.bind"}),
        (io, "pipeline/x.py", "from ..transport.pages import runs_of\nimport os", set()),
        (pickles, "transport/x.py", "import pickle", {"pickle"}),
        (pickles, "transport/x.py", "sock.recv_pyobj()", {"recv_pyobj"}),
        (pickles, "transport/x.py", "sock.recv()", set()),
        (opens_sockets, "workers/x.py", "import socket", {"import socket"}),
        (opens_sockets, "workers/x.py", "import zmq\nzmq.Context().socket(1)", {"socket"}),
        (opens_sockets, "workers/x.py", "import zmq.asyncio\ns.bind('tcp://*:1')", {"bind"}),
        (opens_sockets, "workers/x.py", "import zmq\nfrom .y import bind\nbind(1)", set()),
        (opens_sockets, "pipeline/x.py", "import asyncio\ncreate_server(f)", {"create_server"}),
    ],
)  # fmt: skip
def test_the_checks_find_what_they_look_for(check, name, source, found):
    """Each of them, on a few lines that break the rule and a few that do not."""
    got = check(name, ast.parse(source))
    assert {item.removeprefix("pageferry.") for item in got} == found
