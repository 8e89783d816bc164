"""The command of a stream: its stdin and stdout are the socket at PATH. Needs no more than Python.

python -I -S pipe.py PATH
"""

import os
import socket
import sys
import threading


def main(path):
    with open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write("pf-command")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)

        def back():
            while data := sock.recv(65536):
                while data:
                    data = data[os.write(1, data) :]
            os._exit(0)

        threading.Thread(target=back, daemon=True).start()
        while data := os.read(0, 65536):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
