"""What an API server remembers of one kind of object: the present, and some of the past."""

from typing import Any, NamedTuple


class Past(NamedTuple):
    version: int
    what: str  # ADDED, MODIFIED or DELETED
    name: str
    obj: Any


class History:
    def __init__(self):
        self.version = 1
        self.objects = {}  # by name: the version and the object
        self._oldest = 1
        self._log = []

    def put(self, name, obj):
        self._add("MODIFIED" if name in self.objects else "ADDED", name, obj)
        self.objects[name] = (self.version, obj)

    def delete(self, name):
        if name in self.objects:
            _, obj = self.objects.pop(name)
            self._add("DELETED", name, obj)

    def forget(self):
        """Compact: every version before the present one is too old."""
        self.version += 1
        self._oldest = self.version
        self._log.clear()

    def present(self):
        """Everything, as if it had just been added."""
        return [Past(version, "ADDED", name, obj) for name, (version, obj) in self.objects.items()]

    def since(self, version):
        """What happened after ``version``; None if that is forgotten."""
        if version < self._oldest:
            return None
        return [past for past in self._log if past.version > version]

    def _add(self, what, name, obj):
        self.version += 1
        self._log.append(Past(self.version, what, name, obj))
