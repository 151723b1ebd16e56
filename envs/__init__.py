"""The market modules that the scripts in algos/ share. Importing this package registers its Gymnasium environments."""

import hashlib
import os
from pathlib import Path

import gymnasium as gym
import numba

# Threads that wait for each other spin only briefly: with libgomp's default one busy neighbour on the machine makes
# every parallel step ten times slower. (Read when libgomp is loaded: scripts that import torch first set it themselves.)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Numba's disk cache knows only the file of the function that it stores: edit costs.py, and the cached kernels of
# leadlag.py would go on charging by the old rules. So the cache lives under the hash of all our sources.
_here = Path(__file__).parent
_sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_here.glob("*.py")))).hexdigest()[:16]
_writable = _here if os.access(_here, os.W_OK) else Path.home() / ".cache" / "cleanmarkets"
numba.config.CACHE_DIR = str(Path(numba.config.CACHE_DIR or _writable / "__pycache__") / f"numba-{_sources}")

gym.register(
    id="LeadLag-v0",
    entry_point="envs.leadlag:LeadLagEnv",
    vector_entry_point="envs.leadlag:LeadLagVectorEnv",
)
