"""`pageferry check`: what it finds here, and what it would say of other hosts."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import pageferry

from pageferry.tools.cli.check import table
from pageferry.workers import host
from pageferry.workers.kernel.probing import Userfaultfd

NAMES = [
    "kernel", "architecture", "processors", "userfaultfd", "missing-shmem", "missing-hugetlbfs",
    "minor-shmem", "minor-hugetlbfs", "event-remove", "wp-async", "wp-unpopulated", "wp-shmem",
    "move", "pagemap-scan", "ptrace", "real-time", "huge-pages-2M", "huge-pages-1G",
    "shmem-huge-pages", "dev-shm",
]  # fmt: skip

# Nobody may not be able to read Python or the package: all is imported before root is given up.
# That makes /proc/self root's, until the process is dumpable again (PR_SET_DUMPABLE).
UNPRIVILEGED = """
import ctypes, os
import concurrent.futures.thread
import pageferry.tools.cli.check
from pageferry.tools.cli.main import main
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0
main(["check", "--json"])
"""


def sysctl_allows():
    """None if the kernel has no such setting: then it allows."""
    path = Path("/proc/sys/vm/unprivileged_userfaultfd")
    return not path.exists() or path.read_text().strip() == "1"


def parsed(done):
    """--json's findings by name."""
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert set(report) == {"host", "findings"}
    assert report["host"]["processors"] == len(os.sched_getaffinity(0))
    assert [row["name"] for row in report["findings"]] == NAMES
    assert all(row["detail"] and bool(row["cost"]) != row["ok"] for row in report["findings"])
    return {row["name"]: row for row in report["findings"]}


def test_json_has_everything():
    rows = parsed(pageferry("check", "--json"))
    assert rows["architecture"]["ok"]


def test_people_get_a_line_each():
    """And exit code 0, whatever is lacking."""
    done = pageferry("check")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == NAMES
    assert {line.split()[0] for line in lines} <= {"ok", "--"}


def test_nothing_of_this_process_changes():
    """Real time and nice levels are tried, not kept."""

    def state():
        return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)

    before = state()
    assert [finding.name for finding in host.findings()] == NAMES
    assert state() == before


def test_root_has_userfaultfd():
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    if not int(status["CapEff"], 16) >> 19 & 1:
        pytest.skip("needs CAP_SYS_PTRACE")
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        pytest.skip("root of a user namespace only: the kernel asks for the host's")
    if status["Seccomp"] != "0":
        pytest.skip("a seccomp filter may forbid userfaultfd to root too")
    rows = parsed(pageferry("check", "--json"))
    assert rows["userfaultfd"]["ok"]
    assert rows["missing-shmem"]["ok"]


def test_without_root():
    """Answers all the same, and does not claim what only root has."""
    if os.geteuid() != 0:
        pytest.skip("not root: the other tests ran without it")
    rows = parsed(
        subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    )
    assert rows["userfaultfd"]["ok"] == sysctl_allows()
    assert "CAP_SYS_PTRACE" not in rows["ptrace"]["detail"] or not rows["ptrace"]["ok"]
    assert rows["pagemap-scan"] == parsed(pageferry("check", "--json"))["pagemap-scan"]


@pytest.mark.parametrize(
    ("answer", "filtered", "device", "ok", "detail", "cost"),
    [
        (Userfaultfd(0, True, 1), True, True, True, "all faults", ""),
        (Userfaultfd(errno.EPERM, True, 1), False, False, False, "user-mode only", "KVM"),
        (Userfaultfd(errno.EPERM, True, 1), False, True, False, "/dev/userfaultfd", "KVM"),
        (Userfaultfd(errno.EPERM, False, 0), False, False, False, "CAP_SYS_PTRACE", "no postcopy"),
        (Userfaultfd(errno.EPERM, False, 0), True, False, False, "seccomp", "no postcopy"),
        (Userfaultfd(errno.ENOSYS, False, 0), False, False, False, "has none", "no postcopy"),
        (Userfaultfd(errno.EMFILE, False, 0), False, False, False, "open files", "no postcopy"),
    ],
)
def test_what_userfaultfd_answers(answer, filtered, device, ok, detail, cost):
    finding = host.userfaultfd_finding(answer, filtered=filtered, device=device)
    assert finding.ok == ok
    assert detail in finding.detail
    assert cost in finding.cost


def test_features_by_their_bits():
    """Those of Linux 5.10 on x86-64, then none, then all."""
    old = {finding.name: finding for finding in host.feature_findings(0x1FF)}
    assert {name for name, finding in old.items() if finding.ok} == {
        "missing-shmem", "missing-hugetlbfs", "event-remove",
    }  # fmt: skip
    assert old["wp-async"].cost == "writes are found by content: every round reads all memory"
    assert not any(finding.ok for finding in host.feature_findings(0))
    assert all(finding.ok for finding in host.feature_findings(0x1FFFF))


@pytest.mark.parametrize(
    ("scope", "capable", "ok"),
    [
        (None, False, True), (0, False, True), (1, False, False), (2, False, False),
        (None, True, True), (1, True, True), (2, True, True), (3, True, False), (3, False, False),
    ],
)  # fmt: skip
def test_ptrace_by_yama_scope_and_capability(scope, capable, ok):
    assert host.ptrace_finding(scope, capable).ok == ok


@pytest.mark.parametrize(
    ("finding", "ok"),
    [
        (host.kernel_finding("6.18.44-fc"), True),
        (host.kernel_finding("6.7.0"), True),
        (host.kernel_finding("5.15.0-91-generic"), False),
        (host.kernel_finding("unknown"), False),
        (host.architecture_finding("aarch64"), True),
        (host.architecture_finding("riscv64"), False),
        (host.real_time_finding(True, -20), True),
        (host.real_time_finding(False, 0), False),
        (host.huge_pages_finding("2M", (3, 4)), True),
        (host.huge_pages_finding("2M", (0, 4)), False),
        (host.huge_pages_finding("1G", None), False),
        (host.shmem_huge_finding("always within_size [advise] never deny force"), True),
        (host.shmem_huge_finding("always within_size advise [never] deny force"), False),
        (host.shmem_huge_finding(None), False),
        (host.dev_shm_finding("2.0 GiB of 4.0 GiB free", 2 << 30), True),
        (host.dev_shm_finding("64.0 MiB of 64.0 MiB free", 64 << 20), False),
    ],
)
def test_other_hosts(finding, ok):
    """A lack has a cost, and what is there has none."""
    assert finding.ok == ok
    assert bool(finding.cost) == (not ok)


def test_the_table_lines_up():
    found = [host.Finding("a", True, "there", ""), host.Finding("long", False, "not", "slow")]
    assert table(found) == "ok  a     there\n--  long  not: slow"
