"""What a batch says to a host of its fleet and what follows from the answers; how manifests name
hosts. No process, no dask."""

import sys

import pytest

from pageferry.pipeline.batch import no_fleet, worth_another_try
from pageferry.pipeline.fleet import check_dask
from pageferry.pipeline.fleet_attempt import (
    BEGIN,
    HAND_OVER,
    Attempt,
    Heard,
    News,
    Orders,
    resource,
)
from pageferry.pipeline.manifest import check_host, manifest, task
from pageferry.transport.errors import (
    Cancelled,
    ConfirmationLost,
    HostLacks,
    PeerLost,
    UsageError,
)

TO = "tcp://192.0.2.7:4444"


def begun():
    attempt = Attempt(1000)
    assert attempt.heard(News("run", BEGIN)) is Heard.NOTHING
    return attempt


def test_nothing_begins_before_it_is_there():
    attempt = Attempt(1000)
    assert attempt.heard(News()) is Heard.NOTHING
    assert attempt.orders == Orders(max_bandwidth=1000)
    assert attempt.heard(News("run", BEGIN)) is Heard.NOTHING
    assert attempt.orders == Orders("run", begin=True, max_bandwidth=1000)
    attempt.limit(500)
    assert attempt.orders == Orders("run", begin=True, max_bandwidth=500)


def test_one_run_begins_and_no_other():
    """Dask runs the tasks of a lost worker again: that run is not the one that is told to begin."""
    attempt = begun()
    orders = attempt.orders
    assert attempt.heard(News("run", BEGIN)) is Heard.NOTHING  # the answer was lost
    assert attempt.heard(News("again", BEGIN)) is Heard.LOST
    assert attempt.heard(News("again", HAND_OVER)) is Heard.LOST
    assert attempt.heard(News()) is Heard.LOST  # a worker that knows nothing of it
    assert attempt.orders == orders
    assert attempt.is_mine("run") and not attempt.is_mine("again")


def test_a_guest_is_handed_over_when_that_is_written_down():
    attempt = begun()
    assert attempt.heard(News("run", "")) is Heard.NOTHING
    assert attempt.heard(News("run", HAND_OVER)) is Heard.ASKS_TO_HAND_OVER
    assert not attempt.orders.hand_over
    attempt.may_hand_over()
    assert attempt.orders.hand_over
    assert attempt.heard(News("run", HAND_OVER)) is Heard.NOTHING  # the answer is on its way


def test_nothing_is_handed_over_before_it_has_begun():
    attempt = Attempt(0)
    assert attempt.heard(News("run", HAND_OVER)) is Heard.NOTHING
    assert attempt.orders == Orders()


@pytest.mark.parametrize("asks", [BEGIN, HAND_OVER])
def test_who_is_cancelled_gets_no_leave(asks):
    attempt = begun() if asks == HAND_OVER else Attempt(0)
    attempt.cancel()
    before = attempt.orders
    assert attempt.heard(News("run", asks)) is Heard.NOTHING
    assert attempt.orders == before and before.cancel


def test_what_is_true_when_the_worker_is_lost():
    """A guest that had no leave is where it was; one that had may be anywhere, and is not tried
    again by itself."""
    attempt = begun()
    error = attempt.lost("the worker", "killed")
    assert isinstance(error, PeerLost) and worth_another_try(error)
    assert str(error) == "the worker was lost: killed"
    attempt.cancel()
    assert isinstance(attempt.lost("the worker", "killed"), Cancelled)
    attempt = begun()
    attempt.may_hand_over()
    attempt.cancel()
    error = attempt.lost("the worker", "killed")
    assert isinstance(error, ConfirmationLost) and not worth_another_try(error)
    assert "may run at its destination" in str(error)


# ---- manifests -------------------------------------------------------------------------------


def item(**said):
    return {"source": "image:/a.mem", "destination": TO} | said


def test_hosts_of_sources():
    found = manifest(
        {
            "defaults": {"host": "kvm7"},
            "hosts": {"kvm7": {"max-bandwidth": "1GB", "parallel": 2}},
            "items": [
                item(),
                item(host=["kvm8", "kvm-9.example"], name="b"),
                item(host="local", name="c", source="image:c.mem"),
                item(name="d", destination="image:/copies/"),
            ],
        },
        "/here",
    )
    assert [i.hosts for i in found.items] == [
        ("kvm7",), ("kvm8", "kvm-9.example"), (), ("kvm7",),
    ]  # fmt: skip
    assert [i.source for i in found.items][2] == "image:/here/c.mem"
    # the planner knows where each comes from, and the last one goes nowhere else
    tasks = [task(n, i) for n, i in enumerate(found.items)]
    assert [t.source_host for t in tasks] == ["kvm7", "kvm8", "local", "kvm7"]
    assert [t.destination_host for t in tasks] == ["192.0.2.7"] * 3 + ["kvm7"]
    assert found.policy.limits().hosts["kvm7"].max_rate == 10**9


def test_places_at_different_hosts_are_different():
    items = [item(host=h, name="vm", destination="image:/copies/") for h in ("kvm7", "kvm8")]
    assert len(manifest({"items": items}, "/").items) == 2
    with pytest.raises(UsageError, match="would replace each other"):
        manifest({"items": [items[0], items[0]]}, "/")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"host": "kvm 7"}, "item 1: host: 'kvm 7' names no host"),
        ({"host": "a=1"}, "names no host"),
        ({"host": ""}, "names no host"),
        ({"host": ["kvm7", "local"]}, "'local' names no host"),
        ({"host": []}, "host: it must be a name, or several"),
        ({"host": ["kvm7", "kvm7"]}, "several different ones"),
        ({"host": 7}, "host: "),
        ({"host": "kvm7", "source": "image:a.mem"}, "source: image:a.mem: at another host a path"),
        ({"host": "kvm7", "source": "qemu:vm.qmp", "name": "x"}, "a path must be absolute"),
        ({"host": "kvm7", "destination": "image:copies/"}, "destination: image:copies/: at an"),
        ({"host": "kvm7", "destination": "ipc://x"}, "a path must be absolute"),
        ({"host": ["kvm7", "kvm8"], "source": "pid:7"}, "a guest runs at one host"),
    ],
)
def test_one_clear_error(said, text):
    with pytest.raises(UsageError, match=text):
        manifest({"items": [item(**said)]}, "/here")


def test_names_of_resources():
    """As `dask worker --resources` reads them: without comma, space and =."""
    assert resource("kvm-7.example") == "pageferry-kvm-7.example"
    for name in ("a,b", "a b", "a=b", "local", "-x", "x" * 64):
        with pytest.raises(UsageError):
            check_host(name)


def test_an_item_at_another_host_needs_a_fleet():
    (found,) = manifest({"items": [item(host=["kvm7", "kvm8"])]}, "/").items
    error = no_fleet(found)
    assert isinstance(error, UsageError) and not worth_another_try(error)
    assert "at the host kvm7 or kvm8: say --fleet" in str(error)


def test_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(HostLacks, match=r"pip install 'pageferry\[fleet\]'"):
        check_dask()
