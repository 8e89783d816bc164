"""Two directories of keys, each of which allows the other."""

from helpers import receiver

from pageferry.transport.keys import KeyDirectory


class Ends:
    def __init__(self, folder):
        self.here = KeyDirectory.create(str(folder / "here"))
        self.there = KeyDirectory.create(str(folder / "there"))
        self.here.allow(self.there.public, "there")
        self.there.allow(self.here.public, "here")

    def receiver(self, *arguments, **how):
        return receiver("--keys", self.there.path, *arguments, **how)
