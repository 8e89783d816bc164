"""A peer that speaks ZMTP 3.0 (rfc.zeromq.org/spec/23) by hand, and may stop doing so anywhere."""

import contextlib
import socket

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def _property(name, value):
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value


def ready(identity=b""):
    body = b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", identity)
    return bytes([4, len(body)]) + body


def long_frame(size, *, more=False):
    """The head of a message of `size` bytes."""
    return bytes([2 | int(more)]) + size.to_bytes(8, "big")


class RawPeer:
    """One connection. `greeted`: with the handshake done; `window`: bytes that it takes unread."""

    def __init__(self, port, *, greeted=True, identity=b"stranger", window=0):
        self.socket = socket.socket()
        self.socket.settimeout(60)
        if window:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self.socket.connect(("127.0.0.1", port))
        if greeted:
            self.socket.sendall(GREETING + ready(identity))

    def wait_until_greeted(self):
        """Until the other end has done its part of the handshake: libzmq takes little before."""
        said = b""
        while b"Socket-Type" not in said:
            said += self.socket.recv(4096)

    def send(self, data):
        self.socket.sendall(data)

    def wait_until_dropped(self):
        """Until the other end closes; what it says before does not count."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(4096):
                pass

    def close(self):
        self.socket.close()
