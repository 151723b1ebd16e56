"""Markets on a GPU: torch owns the memory, Numba compiles the kernels, and both work on torch's current stream.

The kernels `reset_cuda` and `step_cuda` of an environment call the same scalar functions as its loops on the CPU do, one thread
a market. Nothing here waits for the GPU, so that a rollout can be captured into a CUDA graph. The package numba-cuda is needed.
Under Numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1) all of this runs on the CPU's memory, which is how it is tested there.
"""

import importlib.util
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numba import config, cuda

THREADS = 8 if config.ENABLE_CUDASIM else 128  # of a block: registers, not threads, limit how many fit; simulated ones are slow
DTYPES = {"int64": torch.int64, "uint64": torch.int64, "float64": torch.float64, "float32": torch.float32, "bool": torch.bool}


def unavailable(name: str) -> str | None:
    """Why a market cannot run on the device `name`, such as "cuda" or "cuda:1"; None where it can."""
    try:
        kind, index = (device := torch.device(name)).type, device.index or 0
    except RuntimeError:
        kind, index = name, 0
    if kind != "cuda":
        return f"device={name!r}: expected cpu, cuda or cuda:<number>"
    if config.ENABLE_CUDASIM:
        return None
    if index >= torch.cuda.device_count():
        return f"device={name!r}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices; expected cpu"
    if importlib.util.find_spec("numba_cuda") is None:
        return f'device={name!r}: the package numba-cuda is not installed; expected pip install -e ".[cuda]"'
    return None


def scalars_dtype(parameters: NamedTuple) -> np.dtype:
    """Of a record with the fields of a NamedTuple of bools, ints and floats."""
    kinds = {bool: np.bool_, int: np.int64, float: np.float64}
    return np.dtype([(name, kinds[kind]) for name, kind in parameters.__annotations__.items()], align=True)


class Records:
    """n records of a structured dtype in the memory of a device. A field, as an attribute, is a tensor (n,) that shares it;
    unsigned integers are seen as signed ones."""

    def __init__(self, number: int, dtype: np.dtype, device: torch.device):
        self.dtype, self.raw = dtype, torch.zeros((number, dtype.itemsize), dtype=torch.uint8, device=device)

    def __getattr__(self, name):
        field, offset = self.dtype.fields[name]
        return self.raw.view(DTYPES[field.name])[:, offset // field.itemsize]

    def __len__(self):
        return len(self.raw)


class Gpu:
    """One device: what lies in its memory, as torch's tensors and as the arrays that kernels take, and how kernels start.

    Raises ValueError saying why where `unavailable` says so.
    """

    def __init__(self, name: str):
        if reason := unavailable(name):
            raise ValueError(reason)
        self.device = torch.zeros(0, device="cpu" if config.ENABLE_CUDASIM else name).device  # with its number
        self._scalars, self._scalars_raw = None, None

    def zeros(self, shape, dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=DTYPES[np.dtype(dtype).name], device=self.device)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """A copy of `array` on the device; unsigned integers as signed ones."""
        array = np.array(array, order="C")
        return torch.from_numpy(array.view(np.int64) if array.dtype == np.uint64 else array).to(self.device)

    def array(self, data: torch.Tensor | Records):
        """What kernels take for a contiguous tensor, or for records; no copy."""
        raw = data.raw.flatten() if isinstance(data, Records) else data
        if config.ENABLE_CUDASIM:
            view = raw.numpy()
        elif raw.numel():
            view = cuda.as_cuda_array(raw.detach(), sync=False)
        else:
            view = cuda.device_array(tuple(raw.shape), str(raw.dtype).removeprefix("torch."))
        if not isinstance(data, Records):
            return view
        return view.view(data.dtype).view(np.recarray) if config.ENABLE_CUDASIM else view.view(data.dtype)

    def table(self, array: np.ndarray):
        """What kernels take for a copy of a read-only array, which may be structured."""
        if array.dtype.names is None:
            return self.array(self.tensor(array))
        records = Records(len(array), array.dtype, self.device)
        records.raw.copy_(torch.from_numpy(np.array(array).view(np.uint8).reshape(len(array), -1)))
        return self.array(records)

    def tables(self, market: NamedTuple) -> NamedTuple:
        """Copies of the arrays of `market`; numbers stay what they are."""
        return type(market)(*(self.table(x) if isinstance(x, np.ndarray) else x for x in market))

    def scalars(self, parameters: NamedTuple):
        """A table of one record with the fields of `parameters`: a captured kernel sees what was written here last.

        Raises RuntimeError where they have changed while a graph is captured: on replay they would be those of the capture.
        """
        if parameters != self._scalars:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"{parameters}: differ from {self._scalars}; a captured step keeps its parameters")
            dtype = scalars_dtype(parameters)
            if self._scalars is None:
                self._scalars_raw = Records(1, dtype, self.device)
            filled = np.array([tuple(parameters)], dtype=dtype)
            self._scalars_raw.raw.copy_(torch.from_numpy(filled.view(np.uint8)[None]))
            self._scalars = parameters
        return self.array(self._scalars_raw)

    def checked(self, actions: torch.Tensor, shape: tuple[int, ...], space: gym.Space) -> torch.Tensor:
        """Actions of shape (n, ...) that kernels can take. Raises ValueError for another shape, type or device.

        Values outside the space of one action are a failed assertion of the device, which nobody waits for.
        """
        discrete = isinstance(space, gym.spaces.Discrete)
        expected = shape, torch.int64 if discrete else torch.float32, self.device
        found = tuple(getattr(actions, name, None) for name in ("shape", "dtype", "device"))
        if found != expected:
            raise ValueError(f"actions: {found}: expected a tensor of {expected}")
        inside = (actions >= 0) & (actions < space.n) if discrete else actions.isfinite()
        torch._assert_async(inside.all(), f"actions: expected {f'0..{space.n - 1}' if discrete else 'finite numbers'}")
        return actions.contiguous()

    def launch(self, kernel, number: int, *args):
        """Start a kernel with one thread for each of `number` markets, after what torch's current stream has to do before."""
        stream = 0
        if self.device.type == "cuda":
            pointer = torch.cuda.current_stream(self.device).cuda_stream
            stream = cuda.external_stream(pointer) if pointer else 0
        kernel[-(-number // THREADS), THREADS, stream](*args)
