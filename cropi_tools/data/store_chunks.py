"""The rows of a store, a chunk at a time, read from the chunk files themselves.

The Zarr library takes several times as long as the bytes need, so a chunk whose array says that it is what `StoreWriter` writes
(uncompressed, little-endian, one chunk a row of chunks, its CRC-32C behind it) is read straight into memory; an array of any other layout
goes through Zarr. This module knows the layout of the files and a given array, not the library.

A chunk that agrees with its own checksum may still be another one's, so the store keeps a list of hashes of all chunks (XXH3, 64 bits: several
times as fast as CRC-32C, so that every reader can afford it), and the manifest has the list's hash. Stores made before are read without.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from cropi_tools.data.metadata import TEXT, Each, Listed, checked, read_json
from cropi_tools.runtime.errors import InputError

CHECKSUMS = "checksums.json"
CHECKSUM_BYTES = 4
_LARGEST = 1 << 28  # bytes of the list: ten million chunks
_REMEDY = "the store is damaged, make it again"
_MOST_ROWS = 64  # of a chunk as `StoreWriter` writes it
_PLAIN = {"name": "bytes", "configuration": {"endian": "little"}}


class Chunks:
    """The chunks of the array `vector` of the store in folder `store`: `count` of them, `chunk_rows` rows each, the last one maybe fewer.

    checksums: hashes of all chunks in order, as `read_checksums` gives them; None: of a store that has none.
    """

    def __init__(self, store: Path, array: Any, checksums: Sequence[str] | None = None) -> None:
        self._store, self._array, self._checksums = store, array, checksums
        self.rows, self.dim = array.shape
        self.chunk_rows: int = array.chunks[0]
        self.count = -(-self.rows // self.chunk_rows)
        self.dtype = np.dtype(array.dtype)
        self.direct = _as_written(array)
        self._checked = any(codec.get("name") == "crc32c" for codec in array.metadata.to_dict().get("codecs", ()))

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk's rows: the last one is as long as the others."""
        return self.chunk_rows * self.dim * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        """The size of a chunk file."""
        return self.chunk_bytes + CHECKSUM_BYTES * self._checked

    def path(self, number: int) -> Path:
        """The file of chunk `number`, from 0."""
        return self._store / "vector" / "c" / str(number) / "0"

    def buffer(self) -> NDArray[Any]:
        """Room for one chunk, to give to `read`."""
        rows = self.chunk_rows if self.direct else min(self.chunk_rows, self.rows)
        return np.empty((rows, self.dim), self.dtype)

    def read(self, number: int, buffer: NDArray[Any]) -> NDArray[Any]:
        """The rows [n, dim] of chunk `number`, as stored, in `buffer` until the next call. InputError: it does not read whole, or is not
        what was written there.

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
                tail = file.read(CHECKSUM_BYTES * self._checked + 1)
                if place + len(tail) != self.file_bytes:
                    raise ValueError(f"{self.path(number)} has not the {self.file_bytes} bytes of a chunk")
                if self._checksums is not None:
                    if xxhash.xxh3_64_hexdigest(buffer.data) != self._checksums[number]:
                        raise ValueError(f"{self.path(number)} is not the chunk that was written there")
                elif self._checked and google_crc32c.value(buffer) != int.from_bytes(tail, "little"):
                    raise ValueError(f"{self.path(number)} does not agree with its checksum")
        except FileNotFoundError:
            buffer.fill(np.nan)
        except (ValueError, OSError) as error:
            raise InputError(
                f"{self._store}: rows from {start} do not read ({error}); the store is damaged, make it again"
            ) from None
        return buffer[:length]


def write_checksums(store: Path) -> None:
    """Write the hashes of a store's chunks into a file of their own. InputError: a chunk does not agree with its checksum any more."""
    arrays = [described.parent for described in sorted(store.rglob("zarr.json")) if (described.parent / "c").is_dir()]
    found = {str(array.relative_to(store)): checksums_of(array) for array in arrays}
    (store / CHECKSUMS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def checksums_of(array: Path) -> list[str]:
    """The hashes of the chunks in an array's folder, in their order, in hexadecimal. InputError as `write_checksums`."""
    chunks = array / "c"
    files = [path for path in chunks.rglob("*") if path.is_file()]
    files.sort(key=lambda path: [int(part) for part in path.relative_to(chunks).parts])
    return [_hash_of(path) for path in files]


def _hash_of(path: Path) -> str:
    content = path.read_bytes()
    rows, tail = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if google_crc32c.value(rows) != int.from_bytes(tail, "little"):
        raise InputError(f"{path}: does not agree with its checksum; the store is damaged, make it again")
    return xxhash.xxh3_64_hexdigest(rows)


def read_checksums(store: Path) -> dict[str, list[str]] | None:
    """For each array of a store with chunks their hashes; None where the store keeps none."""
    try:
        found = read_json(store / CHECKSUMS, _REMEDY, _LARGEST)
    except FileNotFoundError:
        return None
    known: dict[str, list[str]] = checked(found, Each(Listed(TEXT)), f"{store / CHECKSUMS}: is damaged", _REMEDY)
    return known


def _as_written(array: Any) -> bool:
    """Whether the array's metadata describe the layout `StoreWriter` writes on a machine of this byte order."""
    found = array.metadata.to_dict()
    encoding = found.get("chunk_key_encoding", {})
    return (
        sys.byteorder == "little"
        and found.get("zarr_format") == 3
        and found.get("data_type") in ("float16", "float32")
        and tuple(array.chunks) == (array.chunks[0], array.shape[1])
        and 0 < array.chunks[0] <= _MOST_ROWS
        and (encoding.get("name"), encoding.get("configuration", {}).get("separator", "/")) == ("default", "/")
        and list(found.get("codecs", ())) in ([_PLAIN], [_PLAIN, {"name": "crc32c"}])
        and not found.get("storage_transformers")
    )
