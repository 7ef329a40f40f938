"""The descriptors of the standard streams, which are never to be those of a file of ours.

The system gives the lowest free number to the next file that is opened. In a process that was
started with a standard stream closed, that would be a part of the store, and a library's warning,
or what a dying process says, would be written into it.
"""

from __future__ import annotations

import os


def occupy() -> list[int]:
    """Open the null device in the place of each standard stream that is closed.

    Returns:
        Their descriptors, among 0, 1 and 2.
    """
    found = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:  # another thread was faster
                os.close(fd)
                continue
            os.set_inheritable(fd, True)
            found.append(number)
    return found
