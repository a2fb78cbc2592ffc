"""`objects://PATH`: a store that several processes share and that is no local path, nor has an exclusive create."""

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

URL = "objects://"


class ObjectStore(LocalFileSystem):  # type: ignore[misc]
    """Objects are files below PATH; moved by copy and removal, as object stores do."""

    protocol = "objects"
    mv = AbstractFileSystem.mv

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return LocalFileSystem._strip_protocol(path.removeprefix(URL))


fsspec.register_implementation("objects", ObjectStore, clobber=True)
