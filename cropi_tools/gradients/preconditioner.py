"""Influence in the geometry of Adam: coordinates scaled by the optimizer state of a training run.

Adam moves coordinate i by the gradient over sqrt(v_i / (1 - beta2^t)) + epsilon, v the running mean of squared gradients after t steps. What a
step on prompt s does to a target is then <g(s), D g> with D = 1 / (sqrt(v / (1 - beta2^t)) + epsilon), not <g(s), g>. Here every gradient,
of prompts and of means, is multiplied by the square root of D before anything is taken from it: inner products, norms and sketches are then
those of the D geometry, and cosines are symmetric. (Xia et al., LESS, arXiv 2402.04333, scale one side only, by D, and also feed the gradient
through the first moment.)

Coordinates of almost no second moment. Embedding rows of tokens that training never met, and biases that the softmax cancels, get a rounding
residue or a softmax tail as their gradient: sqrt(v) of 1e-9 to 1e-7 where ordinary coordinates have 1e-4. The state says nothing of the
scale of a real gradient there, and D would let a few percent of the coordinates make up nearly all of a prompt's norm. Adam itself does not: its
step divides by the v that already contains the new gradient. That v differs from prompt to prompt, so neither one mean nor one sketch could
serve all prompts; instead, coordinates below 1 % of the median are left out. docs/results compares the choices with real steps.

The median is over the coordinates of v > 0, each counted by its sqrt(v), so that it stays where the ordinary coordinates are even where most
are residues (a small model with a large vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cropi_tools.data.policies import OPTIMIZER_STATE, adam_beta2
from cropi_tools.runtime.errors import InputError
from cropi_tools.sketches.spec import Layout

EPSILON = 1e-8  # AdamW's
LEAST = 0.01  # of the median of sqrt(v); coordinates below it are left out
_KEPT_BYTES = 1 << 30  # scales of smaller policies are kept, of larger ones computed again from the mapped state
_BITS = 16  # of a float32, dropped to count values: 128 bins in each power of two
_AT_ONCE = 1 << 24


class Preconditioner:
    """sqrt(D) of a policy folder's optimizer state, parameter by parameter; `least`: the sqrt(v), bias corrected, below which it is 0.

    The bias correction takes beta2 from the folder's training.json and the steps from the state; where either is missing (folders of older
    versions, states made by hand) there is none. InputError: no state there, of other parameters, not finite, or without any second moment.
    """

    def __init__(self, folder: str, layout: Layout, device: torch.device) -> None:
        path = Path(folder) / OPTIMIZER_STATE
        self._device = device
        beta2 = adam_beta2(folder)
        self._corrections: dict[str, float] = {}
        try:
            with safe_open(path, "pt") as opened:
                present = set(opened.keys())
                for name, place in layout.places.items():
                    if f"exp_avg_sq/{name}" not in present:
                        raise InputError(f"{path}: holds no state of parameter {name}; was it trained?")
                    size = opened.get_slice(f"exp_avg_sq/{name}").get_shape()
                    if torch.Size(size).numel() != place.stop - place.start:
                        raise InputError(f"{path}: the state of parameter {name} has another size than the policy's")
                    if beta2 is not None and f"step/{name}" in present:
                        steps = float(opened.get_tensor(f"step/{name}"))
                        if steps >= 1:
                            self._corrections[name] = 1 - beta2**steps
                self._squares = {name: opened.get_tensor(f"exp_avg_sq/{name}") for name in layout.places}
        except SafetensorError as error:
            raise InputError(f"{path}: does not open as safetensors ({error})") from None
        try:
            self.least = LEAST * weighted_median(self._roots(name) for name in layout.places)
        except ValueError as error:
            raise InputError(f"{path}: its second moments are {error}; take the state of another policy") from None
        self._kept: dict[str, torch.Tensor] = {}
        self._keep = 4 * layout.size <= _KEPT_BYTES

    def _roots(self, name: str) -> torch.Tensor:
        """sqrt(v), bias corrected, of a parameter's coordinates, flat float32."""
        squares = self._squares[name].reshape(-1).to(self._device, torch.float32)
        return (squares / self._corrections.get(name, 1.0)).sqrt()

    def scale(self, name: str) -> torch.Tensor:
        """The factors of a parameter's coordinates, flat float32."""
        if name in self._kept:
            return self._kept[name]
        roots = self._roots(name)
        factors = torch.where(roots >= self.least, (roots + EPSILON).rsqrt(), 0.0)
        if self._keep:
            self._kept[name] = factors
        return factors


def weighted_median(parts: Iterable[torch.Tensor]) -> float:
    """The value below which half of the sum of all values lies, to 1 %; values >= 0, float32, part by part.

    ValueError: a value is not finite or negative, or all are zero.
    """
    sums = torch.zeros(1 << (32 - _BITS), dtype=torch.float64)
    for part in parts:
        if not bool((torch.isfinite(part) & (part >= 0)).all()):
            raise ValueError("not finite or negative")
        for block in part.cpu().split(_AT_ONCE):
            # floats that are not negative are in the order of their bits: bins are powers of two in equal parts
            sums += torch.bincount(block.contiguous().view(torch.int32) >> _BITS, block.double(), len(sums))
    total = float(sums.sum())
    if total == 0.0:
        raise ValueError("all zero")
    place = int((sums.cumsum(0) < total / 2).sum())
    return float(torch.tensor([(place << _BITS) + (1 << (_BITS - 1))], dtype=torch.int32).view(torch.float32))
