"""The market modules that the scripts in algos/ share. Importing this package registers its Gymnasium environments."""

import contextlib
import ctypes
import hashlib
import os
from pathlib import Path

import gymnasium as gym
import numba

# Threads that wait for each other spin only briefly: with libgomp's default one busy neighbour on the machine makes
# every parallel step ten times slower. (Read when libgomp is loaded: scripts that import torch first set it themselves.)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Freed memory stays with the process: to give megabytes back after every tensor operation and fault them in again costs a
# tenth of the training. (glibc only: M_TRIM_THRESHOLD 1 GiB, M_MMAP_THRESHOLD 32 MiB; elsewhere nothing changes.)
with contextlib.suppress(AttributeError, OSError, TypeError):
    _libc = ctypes.CDLL(None)
    _libc.mallopt(-1, 2**30)
    _libc.mallopt(-3, 2**25)

# Numba's disk cache knows only the file of the function that it stores: edit costs.py, and the cached kernels of
# leadlag.py would go on charging by the old rules. So the cache lives under the hash of all our sources.
_here = Path(__file__).parent
_sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_here.glob("*.py")))).hexdigest()[:16]
_writable = _here if os.access(_here, os.W_OK) else Path.home() / ".cache" / "cleanmarkets"
numba.config.CACHE_DIR = str(Path(numba.config.CACHE_DIR or _writable / "__pycache__") / f"numba-{_sources}")

for _name, _module in (
    ("LeadLag", "leadlag"), ("Portfolio", "portfolio"), ("Trading", "trading"), ("Navigation2D", "navigation"),
    ("Bandits", "bandits"),
):  # fmt: skip
    gym.register(
        id=f"{_name}-v0",
        entry_point=f"envs.{_module}:{_name}Env",
        vector_entry_point=f"envs.{_module}:{_name}VectorEnv",
    )
