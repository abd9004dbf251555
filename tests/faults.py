"""Ends a test's writer at any change of any file."""

import asyncio
import os
import sys

from zarr.core.sync import sync

from cache import CacheError


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


class Fault:
    """Ends every change of a folder from the n-th on: by death, or by a disk that is full.

    It is told of changes by the interpreter's audit events, so it sees those that Zarr makes as well.
    """

    def __init__(self):
        self.folder, self.left, self.error = None, 0, None
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.folder is None or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if str(args[0]).startswith(self.folder):
            self.left -= 1
            if self.left < 0:
                raise self.error

    def run(self, folder, changes, error, action, said=None):
        """Runs an action that may change the folder so many times; whether it came to its end."""
        self.folder, self.left, self.error = str(folder), changes, error
        try:
            action()
        except (Killed, CacheError) as caught:
            if said is not None:
                said.append(str(caught))
            return False
        finally:
            sync(_others())  # what Zarr's threads have begun dies with the rest
            self.folder = None
        return True


async def _others():
    """Waits for all that Zarr's loop still has to do."""
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=10)


FAULT = Fault()
