"""How processes end: by request, and with the process that started them."""

import ctypes
import signal
import sys

LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # of prctl, <linux/prctl.h>


def end_on_signals():
    """Let a request to end raise KeyboardInterrupt, as Ctrl-C does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def end_with_parent(number: int):
    """For a new process: have the system send it a signal when its parent is gone, however that ended. Linux only.

    The parent is the thread that started it.
    """
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, number)
