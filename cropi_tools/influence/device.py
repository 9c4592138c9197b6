"""A gradient used where it lies on a GPU: its countsketch, and its norm with exact inner products, in one launch each.

The tensors of a gradient are many and mostly small, so neither is done tensor by tensor: the tensors are gathered,
their addresses are sent to the device, and one launch of `triton_kernels.py` goes over all of them. What never changes
is laid down once: the signs as one bit a coordinate, and the segments sorted by their shift, so that each program finds
those that reach its own piece of the sketch. That takes an eighth of a byte a coordinate there, and sums of 8 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from cropi_tools.influence.kernels import ITEM_STEP, WORD_STEP, mix64

RUN = 32  # coordinates under one word of signs; tensors are addressed in runs
LARGEST_TILE = 512  # coordinates of the sketch that one program adds up
PROGRAMS = 4096  # programs wanted at least, several rounds on any device; part of the result's low bits, so fixed

U = np.uint64
_32 = U(32)


# These kernels have never run on a GPU, only their indexing is tested, by plain loops. Until tests/gpu has passed on one, a gradient
# there is copied to the CPU and sketched by numba.
ENABLED = False


def triton_kernels(device: torch.device) -> Any:
    """The compiled kernels for tensors of this device, a module; None where numba and plain torch do the work."""
    if not ENABLED or device.type != "cuda" or find_spec("triton") is None:
        return None
    from cropi_tools.influence import triton_kernels as kernels

    return kernels


class DeviceCountsketch:
    """The countsketch of gradients on one device.

    kernels: what `triton_kernels` gave; tensor_keys and sizes (coordinates): by name.
    Gradients are read when the next one of the same name comes, or in `total`: until then they must stay as they are.
    """

    def __init__(
        self,
        kernels: Any,
        tensor_keys: Mapping[str, np.uint64],
        sizes: Mapping[str, int],
        hash_dim: int,
        segment: int,
        device: torch.device,
    ) -> None:
        self._kernels, self._hash_dim, self._segment = kernels, hash_dim, segment
        self._names = list(tensor_keys)
        with np.errstate(over="ignore"):  # without the compiler the hash wraps around in numpy, which warns
            hashes = [_hashes(tensor_keys[name], -(-sizes[name] // segment), hash_dim, segment) for name in self._names]
        counts = np.array([len(shifts) for shifts, _ in hashes])
        all_shifts = np.concatenate([shifts for shifts, _ in hashes])
        tensor = np.repeat(np.arange(len(counts)), counts)
        index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        left = np.repeat([sizes[name] for name in self._names], counts) - index * segment

        runs = segment // RUN
        remainder, shift = all_shifts % RUN, all_shifts // RUN
        span = hash_dim // RUN + runs  # runs of an output that is not yet wrapped round
        order = np.lexsort((shift, remainder))
        tile = min(LARGEST_TILE, 1 << segment.bit_length() - 1) // RUN
        tiles = -(-span // tile)
        starts = np.arange(tiles) * tile
        keys = (remainder * span + shift)[order]
        bounds = [
            # those that end after the tile begins, up to those that begin after it ends
            np.searchsorted(keys, np.arange(RUN)[:, None] * span + np.clip(edge, 0, span))
            for edge in (starts - runs + 1, starts + tile)
        ]
        parts = -(-PROGRAMS // (RUN * tiles))

        def there(values: NDArray[Any], kind: type) -> torch.Tensor:
            return torch.from_numpy(values.astype(kind)).to(device)

        self._tensor = there(tensor[order], np.int64)
        self._first = there((index * runs)[order], np.int64)
        self._lengths = there(-(-np.minimum(left, segment) // RUN)[order], np.int32)
        self._shifts = there(shift[order], np.int32)
        self._words = there((np.arange(len(order)) * runs)[order], np.int64)
        self._bounds = there(np.stack(bounds, -1).reshape(-1, 2), np.int32)
        self._signs = torch.from_numpy(np.concatenate([words for _, words in hashes]).view(np.int32)).to(device)
        self._sums = torch.empty(parts, RUN, tiles, tile * RUN, dtype=torch.float32, device=device)
        self._waiting: dict[str, torch.Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Start a new gradient."""
        self._waiting.clear()
        self._sums.zero_()

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add the gradient of one tensor, of a floating type."""
        if name in self._waiting:
            self.flush()
        self._waiting[name] = gradient

    def total(self) -> NDArray[np.float32]:
        """The sketch, float32 [hash_dim + segment] on the CPU, not yet wrapped round."""
        self.flush()
        rows = self._sums.sum(0).reshape(RUN, -1)
        # row r belongs r places to the right: with RUN zeros after each row, that is a row length one less
        width = rows.shape[1] + RUN - 1
        skewed = torch.nn.functional.pad(rows, (0, RUN)).reshape(-1)[:-RUN].view(RUN, width)
        return skewed.sum(0)[: self._hash_dim + self._segment].cpu().numpy()

    def flush(self) -> None:
        """Launch what was added and not yet read; the device does it in its own time."""
        for anchor, offsets, there in _gathered([self._waiting.get(name) for name in self._names], self._sums.device):
            addresses = offsets[self._tensor] + self._first
            lengths = self._lengths * there[self._tensor]
            arguments = (addresses, lengths, self._shifts, self._words, self._signs, self._bounds, self._sums)
            self._kernels.countsketch(anchor, *arguments)
        self._waiting.clear()


class DeviceProducts:
    """Squared norms of gradients on one device, and their inner products with float32 means there.

    sizes: coordinates by name; means: each a tensor by name, all names of `sizes`.
    """

    def __init__(
        self, kernels: Any, sizes: Mapping[str, int], means: Sequence[Mapping[str, torch.Tensor]], device: torch.device
    ) -> None:
        self._kernels, self._device, self._names = kernels, device, list(sizes)
        self._sizes = torch.tensor([-(-size // RUN) for size in sizes.values()], device=device)
        block = kernels.PRODUCT_BLOCK
        counts = np.array([-(-size // block) for size in sizes.values()])
        tensors = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._blocks = (torch.from_numpy(tensors).to(device), torch.from_numpy(index * (block // RUN)).to(device))
        flat = [aligned(mean[name]) for mean in means for name in self._names]
        self._kept = flat  # the kernel has their addresses
        self._means = (
            flat[0] if flat else torch.empty(0, device=device),
            torch.tensor(_distances(flat), dtype=torch.int64, device=device).reshape(len(means), len(self._names)),
        )

    def measure(self, gradients: Mapping[str, torch.Tensor]) -> list[float]:
        """The squared norm and the inner product with each mean of one gradient; a name left out counts as zero."""
        total = torch.zeros(1 + len(self._means[1]), dtype=torch.float64, device=self._device)
        for anchor, offsets, there in _gathered([gradients.get(name) for name in self._names], self._device):
            total += self._kernels.products(anchor, offsets, self._sizes * there, *self._means, *self._blocks)
        found: list[float] = total.tolist()
        return found


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of 2 or 4 bytes a coordinate, made of whole runs from an address that is a multiple of a run.

    Copied into one flat tensor, and filled up with zeros, where it is not so already.
    """
    kind = tensor.dtype if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    run, size = RUN * kind.itemsize, tensor.numel()
    if kind == tensor.dtype and size % RUN == 0 and tensor.data_ptr() % run == 0 and tensor.is_contiguous():
        return tensor
    length = -(-size // RUN) * RUN
    buffer = torch.zeros(length + RUN, dtype=kind, device=tensor.device)
    start = -buffer.data_ptr() % run // kind.itemsize
    buffer[start : start + size] = tensor.detach().reshape(-1)
    return buffer[start : start + length]


def _gathered(
    tensors: Sequence[torch.Tensor | None], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each type among the tensors: one of them, the anchor; distances from it in runs, int64; which are there.

    Launch before asking for the next: copies made here live until then.
    """
    whole = [None if tensor is None else aligned(tensor) for tensor in tensors]
    for kind in sorted({tensor.dtype for tensor in whole if tensor is not None}, key=str):
        mine = [tensor if tensor is not None and tensor.dtype == kind else None for tensor in whole]
        present = [tensor for tensor in mine if tensor is not None]
        distances = iter(_distances(present))
        offsets = [0 if tensor is None else next(distances) for tensor in mine]
        there = [tensor is not None for tensor in mine]
        yield present[0], torch.tensor(offsets, device=device), torch.tensor(there, dtype=torch.int32, device=device)


def _distances(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How many runs each tensor lies behind the first."""
    if not tensors:
        return []
    first, run = tensors[0].data_ptr(), RUN * tensors[0].element_size()
    return [(tensor.data_ptr() - first) // run for tensor in tensors]


@njit  # type: ignore[misc,unused-ignore]
def _hashes(
    tensor_key: np.uint64, segments: int, hash_dim: int, segment: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The shift of each segment of a tensor, and its words of signs in the order of coordinates."""
    shifts = np.empty(segments, np.int64)
    words = np.empty(segments * (segment // 64), np.uint64)
    for index in range(segments):
        key = mix64(tensor_key + U(index + 1) * ITEM_STEP)
        shifts[index] = np.int64(((key >> _32) * U(hash_dim)) >> _32)
        for word in range(segment // 64):
            words[index * (segment // 64) + word] = mix64(key + U(word + 1) * WORD_STEP)
    return shifts, words
