"""Features of prompts on disk: safetensors, one float16 row a prompt, with the ids beside them.

The file grows row by row, since the number of prompts is known before the first: header, ids, then rows. So it is
written in bounded memory, and a stopped command resumes after the last row it committed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cropi_tools.data.metadata import TEXT, checked, parse_json
from cropi_tools.runtime.errors import InputError

_KEY = "cropi"
_REMEDY = "make it again with cropi-embed"
_FACTS = {"policy": TEXT, "pooling": TEXT}
_LARGEST = float(np.finfo(np.float16).max)


def header(ids: Sequence[str], width: int, facts: Mapping[str, Any]) -> bytes:
    """Everything before the rows: the safetensors header and the ids.

    ids: of the prompts in order. width: of a row. facts: JSON values; `policy` (hash) and `pooling` among them.
    """
    names = "\n".join(json.dumps(name) for name in ids).encode()
    size = 2 * len(ids) * width
    described = {
        "__metadata__": {_KEY: json.dumps(dict(facts), sort_keys=True)},
        "ids": {"dtype": "U8", "shape": [len(names)], "data_offsets": [0, len(names)]},
        "features": {"dtype": "F16", "shape": [len(ids), width], "data_offsets": [len(names), len(names) + size]},
    }
    text = json.dumps(described).encode()
    # the rows begin at a whole number of float16s, and the format wants the header itself to end at a multiple of 8
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + names


def as_rows(values: NDArray[np.floating[Any]]) -> bytes:
    """Features [n, width] as they are stored; what is beyond float16 becomes its largest number."""
    return np.clip(values, -_LARGEST, _LARGEST).astype("<f2").tobytes()


class Place(NamedTuple):
    """Where a prompt's row is."""

    file: int
    row: int


class Features:
    """Features of a pool, in one file or several (shards). places: by prompt id; width: of a row."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        """InputError: a file does not open or is damaged, an id comes twice, or files have other widths or policies."""
        self._paths = [str(path) for path in paths]
        self.places: dict[str, Place] = {}
        self.width, first = 0, None
        for number, path in enumerate(self._paths):
            facts, ids, width = _read_header(path)
            if first is None:
                first, self.width = facts, width
            if (facts, width) != (first, self.width):
                raise InputError(f"{path}: its features are not of the same policy and kind as those of {paths[0]}")
            for row, name in enumerate(ids):
                if name in self.places:
                    raise InputError(f"{path}: prompt '{name}' comes twice; ids must be unique")
                self.places[name] = Place(number, row)

    def rows(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Features of these prompts, float32 [n, width]; fast where they lie near each other in the file.

        InputError: a prompt has none, or features that are not numbers.
        """
        found = np.empty((len(ids), self.width), np.float32)
        by_file: dict[int, list[tuple[int, int]]] = {}
        for number, name in enumerate(ids):
            if name not in self.places:
                raise InputError(
                    f"{', '.join(self._paths)}: prompt '{name}' has no features; make them of the whole pool with cropi-embed"
                )
            place = self.places[name]
            by_file.setdefault(place.file, []).append((place.row, number))
        for file, wanted in by_file.items():
            self._fill(found, self._paths[file], np.array(wanted))
        return found

    def _fill(self, found: NDArray[np.float32], path: str, wanted: NDArray[np.int64]) -> None:
        """Rows of one file into `found`. wanted: (row, place in `found`) pairs."""
        wanted = wanted[np.argsort(wanted[:, 0], kind="stable")]
        try:
            with safe_open(path, "np") as opened:
                stored = opened.get_slice("features")
                # prompts that lie apart are read one by one: a slice would read all that is between them
                edges = np.flatnonzero(np.diff(wanted[:, 0]) > _APART) + 1
                for part in np.split(wanted, edges):
                    start = int(part[0, 0])
                    block = stored[start : int(part[-1, 0]) + 1]
                    found[part[:, 1]] = block[part[:, 0] - start]
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: does not open as safetensors ({error}); {_REMEDY}") from None
        if not np.isfinite(found[wanted[:, 1]]).all():
            raise InputError(f"{path}: holds features that are not finite; {_REMEDY}")


_APART = 16  # rows between two prompts that are read together


def _read_header(path: str) -> tuple[dict[str, Any], list[str], int]:
    """The facts of a file of features, the ids of its prompts, and the width of a row. InputError: it is none, or damaged."""
    try:
        with safe_open(path, "np") as opened:
            metadata, names = opened.metadata() or {}, set(opened.keys())
            if _KEY not in metadata or names != {"ids", "features"}:
                raise InputError(f"{path}: holds no features of prompts; {_REMEDY}")
            shape = opened.get_slice("features").get_shape()
            text = opened.get_tensor("ids").tobytes().decode()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: does not open as safetensors ({error}); {_REMEDY}") from None
    facts = checked(parse_json(metadata[_KEY], f"{path}: its header", _REMEDY), _FACTS, f"{path}: is damaged", _REMEDY)
    ids = [parse_json(line, f"{path}: its ids", _REMEDY) for line in text.split("\n")]
    if len(shape) != 2 or shape[0] != len(ids) or not shape[1] or not all(isinstance(name, str) for name in ids):
        raise InputError(f"{path}: its rows are not those of its ids; {_REMEDY}")
    return facts, ids, shape[1]
