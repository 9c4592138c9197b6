"""The rows of a store, a chunk at a time, read from the chunk files themselves.

The Zarr library takes several times as long as the bytes need, so a chunk whose array says that it is what `StoreWriter` writes
(uncompressed, little-endian, one chunk a row of chunks) is read straight into memory; an array of any other layout goes through
Zarr. This module knows the layout of the files and a given array, not the library.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cropi_tools.data.errors import InputError


class Chunks:
    """The chunks of the array `vector` of the store in folder `store`: `count` of them, `chunk_rows` rows each, the last one maybe fewer."""

    def __init__(self, store: Path, array: Any) -> None:
        self._store, self._array = store, array
        self.rows, self.dim = array.shape
        self.chunk_rows: int = array.chunks[0]
        self.count = -(-self.rows // self.chunk_rows)
        self.dtype = np.dtype(array.dtype)
        self.direct = _as_written(array)

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk file: the last one is as long as the others."""
        return self.chunk_rows * self.dim * self.dtype.itemsize

    def path(self, number: int) -> Path:
        """The file of chunk `number`, from 0."""
        return self._store / "vector" / "c" / str(number) / "0"

    def buffer(self) -> NDArray[Any]:
        """Room for one chunk, to give to `read`."""
        return np.empty((self.chunk_rows, self.dim), self.dtype)

    def read(self, number: int, buffer: NDArray[Any]) -> NDArray[Any]:
        """The rows [n, dim] of chunk `number`, as stored, in `buffer` until the next call. InputError: it does not read whole.

        Rows that were never written are NaN, as in Zarr: who reads refuses them with the prompt's id.
        """
        start = number * self.chunk_rows
        length = min(self.chunk_rows, self.rows - start)
        try:
            if not self.direct:
                buffer[:length] = self._array[start : start + length]
                return buffer[:length]
            with open(self.path(number), "rb", buffering=0) as file:
                # the kernel hands out at most 2 GiB a call
                view, place = buffer.reshape(-1).view(np.uint8).data, 0
                while count := file.readinto(view[place:]):
                    place += count
                if place != self.chunk_bytes or file.read(1):
                    raise ValueError(f"{self.path(number)} has not the {self.chunk_bytes} bytes of a chunk")
        except FileNotFoundError:
            buffer.fill(np.nan)
        except (ValueError, OSError) as error:
            raise InputError(
                f"{self._store}: rows from {start} do not read ({error}); the store is damaged, make it again"
            ) from None
        return buffer[:length]


def _as_written(array: Any) -> bool:
    """Whether the array's metadata describe the layout `StoreWriter` writes on a machine of this byte order."""
    found = array.metadata.to_dict()
    encoding = found.get("chunk_key_encoding", {})
    return (
        sys.byteorder == "little"
        and found.get("zarr_format") == 3
        and found.get("data_type") in ("float16", "float32")
        and tuple(array.chunks) == (array.chunks[0], array.shape[1])
        and array.chunks[0] > 0
        and (encoding.get("name"), encoding.get("configuration", {}).get("separator", "/")) == ("default", "/")
        and list(found.get("codecs", ())) == [{"name": "bytes", "configuration": {"endian": "little"}}]
        and not found.get("storage_transformers")
    )
