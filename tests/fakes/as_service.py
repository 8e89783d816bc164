"""As systemd starts a service with a socket: as_service.py tcp|PATH NAME COMMAND…

A socket that listens is descriptor 3, NOTIFY_SOCKET is NAME, and what pageferry-receive.service
forbids is forbidden as far as a process can do that to itself: no memory that is written and then
executed, no new privileges, no capability to regain, no core.
"""

import ctypes
import os
import resource
import socket
import sys

_SET_MDWE, _REFUSE_EXEC_GAIN = 65, 1  # prctl(2), Linux 6.3
_SET_NO_NEW_PRIVS, _CAPBSET_DROP = 38, 24

if __name__ == "__main__":
    where, name, *command = sys.argv[1:]
    if where == "tcp":
        listening = socket.create_server(("127.0.0.1", 0))
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(where)
        listening.listen()
    os.dup2(listening.fileno(), 3)
    os.set_inheritable(3, True)  # it may have been 3 already
    os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "NOTIFY_SOCKET": name}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        for capability in range(64):
            libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_SET_MDWE, _REFUSE_EXEC_GAIN, 0, 0, 0):
        print("no MDWE on this kernel", file=sys.stderr)
    os.execvp(command[0], command)
