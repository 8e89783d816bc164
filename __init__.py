"""pageferry moves the memory of running guests between hosts.

    import pageferry
    report = pageferry.migrate("image:vm.mem", "image:copy.mem", codec="zstd", verify=True)

Everything else is in the subpackages; see ARCHITECTURE.md.
"""

from ._version import __version__
from .pipeline.api import migrate, migrate_async
from .pipeline.parameters import Parameters
from .transport.errors import PageferryError

__all__ = ["PageferryError", "Parameters", "__version__", "migrate", "migrate_async"]
