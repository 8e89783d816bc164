"""The boot guest, which is part of the benchmarks, by the name that tests know it by."""

from pageferry.tools.bench.boot_guest import *  # noqa: F403
