"""Stands in for a bug of libsndfile and of Arrow that nobody knows yet, in processes with this folder on PYTHONPATH.

A file that ends in `ENDS` ends the process that opens it, one that ends in `HANGS` never comes back. Each time a line
goes to the file that the environment variable DECODER_LOG names.
"""

import ctypes
import importlib.util
import os
import sys
import time
from importlib.abc import MetaPathFinder

ENDS, HANGS = b"ends its decoder", b"hangs its decoder"


def meet(content):
    """Do what the end of a file asks for."""
    order = next((order for order in (ENDS, HANGS) if content.endswith(order)), None)
    if order is None:
        return
    if log := os.environ.get("DECODER_LOG"):
        with open(log, "a") as lines:  # noqa: PTH123 - at the start of every process
            lines.write(f"{os.getpid()} {order.decode()}\n")
    if order == ENDS:
        ctypes.string_at(0)
    time.sleep(1e6)


def patch_soundfile(module):
    original = module.SoundFile.__init__

    def init(sound, file, *arguments, **options):
        if hasattr(file, "seek"):
            file.seek(0)
            meet(file.read())
            file.seek(0)
        original(sound, file, *arguments, **options)

    module.SoundFile.__init__ = init


def patch_arrow(module):
    original = module.open_stream

    def open_stream(source, **options):
        meet(source.to_pybytes())
        return original(source, **options)

    module.open_stream = open_stream


class _Patch(MetaPathFinder):
    """Patches a module when it is imported: most processes of a cluster never do."""

    def __init__(self, name, patch):
        self._name, self._patch = name, patch

    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            self._patch(module)

        spec.loader.exec_module = execute_and_patch
        return spec


if __name__ == "sitecustomize":  # not where a test imports it for its constants
    sys.meta_path[:0] = [_Patch("soundfile", patch_soundfile), _Patch("pyarrow.ipc", patch_arrow)]
