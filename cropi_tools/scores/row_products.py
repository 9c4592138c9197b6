"""The inner products of all rows of a store with given vectors, streamed: what scoring spends its time on.

Chunks are read and multiplied by a few threads and come out in order. Rows are multiplied by one of three ways, which differ in rounding
only: plain numpy for little work, a kernel that widens float16 in the cache for few vectors (`row_kernels.py`), and a matrix product of
widened rows for many. Sums are float32.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import local

import numpy as np
from numpy.typing import NDArray

from cropi_tools.data.store import Store
from cropi_tools.data.store_chunks import Chunks
from cropi_tools.runtime.clock import importing

BLOCK_BYTES = 8 << 20  # of rows as stored that one task of a thread reads and multiplies
PLAIN_BELOW = 1 << 24  # coordinates of a store for which compiling a kernel takes longer than going without
MANY = 16  # vectors from which a matrix product is faster than the kernel

Multiply = Callable[[Chunks, range], NDArray[np.float32]]


def row_products(
    store: Store, vectors: NDArray[np.float32], threads: int | None = None
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first row, products float32 [n, V]) of the store's unit rows with `vectors` (float32 [V, dim]), block by block, in order.

    threads: as many as there are processors unless told. Memory: the vectors and a few blocks, whatever the store's size. InputError
    with the prompt's id where a row is not finite: it makes its products so, and only then are the rows looked through.
    """
    if not store.rows:
        return
    chunks = store.chunks
    multiply, alone = _way(chunks, np.ascontiguousarray(vectors, np.float32))
    threads = 1 if alone else threads or processors()
    step = max(1, BLOCK_BYTES // chunks.chunk_bytes)
    blocks = (range(first, min(first + step, chunks.count)) for first in range(0, chunks.count, step))
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[int, Future[NDArray[np.float32]]]] = deque()

        def submit(count: int) -> None:
            for block in islice(blocks, count):
                waiting.append((block[0], pool.submit(multiply, chunks, block)))

        submit(2 * threads)
        try:
            while waiting:
                first, future = waiting.popleft()
                products = future.result()
                submit(1)
                if not np.isfinite(products).all():
                    _find_culprit(store)
                yield first * chunks.chunk_rows, products
        finally:
            for _, future in waiting:
                future.cancel()


def _find_culprit(store: Store) -> None:
    for _ in store.blocks():  # raises at the first row that is not finite
        pass
    raise AssertionError(f"{store.path}: its rows are finite, its products with finite vectors are not")


def _way(chunks: Chunks, vectors: NDArray[np.float32]) -> tuple[Multiply, bool]:
    """How to multiply a range of chunks, and whether it keeps all processors busy by itself."""
    if chunks.dtype != np.float16 or chunks.rows * chunks.dim < PLAIN_BELOW:
        return _plain(vectors), True
    with importing():
        from cropi_tools.scores import row_products_numba as kernels

    spare = local()  # a chunk's room for every thread

    def read(chunks: Chunks, number: int) -> NDArray[np.uint16]:
        if not hasattr(spare, "buffer"):
            spare.buffer = chunks.buffer()
        bits: NDArray[np.uint16] = chunks.read(number, spare.buffer).view(np.uint16)
        return bits

    def few(chunks: Chunks, block: range) -> NDArray[np.float32]:
        out = np.empty((_length(chunks, block), len(vectors)), np.float32)
        at = 0
        for number in block:
            rows = read(chunks, number)
            kernels.few_products(rows, vectors, out[at : at + len(rows)])
            at += len(rows)
        return out

    def many(chunks: Chunks, block: range) -> NDArray[np.float32]:
        wide = np.empty((_length(chunks, block), chunks.dim), np.float32)
        at = 0
        for number in block:
            rows = read(chunks, number)
            kernels.widen(rows.reshape(-1), wide[at : at + len(rows)].reshape(-1))
            at += len(rows)
        with np.errstate(invalid="ignore"):  # as below
            return wide @ vectors.T

    if len(vectors) >= MANY:
        return many, True
    # compiled here, once, not by every thread for itself
    kernels.few_products(np.zeros((1, chunks.dim), np.uint16), vectors, np.empty((1, len(vectors)), np.float32))
    return few, False


def _plain(vectors: NDArray[np.float32]) -> Multiply:
    def multiply(chunks: Chunks, block: range) -> NDArray[np.float32]:
        buffer = chunks.buffer()
        with np.errstate(invalid="ignore"):  # what is not finite is refused by its prompt's id
            found = [chunks.read(number, buffer).astype(np.float32) @ vectors.T for number in block]
        return np.concatenate(found)

    return multiply


def _length(chunks: Chunks, block: range) -> int:
    return min(block.stop * chunks.chunk_rows, chunks.rows) - block.start * chunks.chunk_rows


def processors() -> int:
    """Threads to use: OMP_NUM_THREADS if it is set, else the processors this process may run on, eight at most."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else min(8, len(os.sched_getaffinity(0)))
