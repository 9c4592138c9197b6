"""Influence in the geometry of Adam: coordinates scaled by the optimizer state of a training run.

Adam moves coordinate i by the gradient over sqrt(v_i) + epsilon, v the running mean of squared gradients. What a step on prompt s does to a
target is then <g(s), D g> with D = 1 / (sqrt(v) + epsilon), not <g(s), g>. Here every gradient, of prompts and of means, is multiplied by the
square root of D before anything is taken from it: inner products, norms and sketches are then those of the D geometry, and cosines
are symmetric. (Xia et al., LESS, arXiv 2402.04333, scale one side only, by D, and also feed the gradient through the first moment.)

The bias correction of v is the same factor for all coordinates and left out. A coordinate that never had a gradient (v = 0) is left out too:
the state says nothing of its scale, and 1 / epsilon would drown all the others.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cropi_tools.data.errors import InputError
from cropi_tools.data.policies import OPTIMIZER_STATE
from cropi_tools.influence.spec import Layout

EPSILON = 1e-8  # AdamW's
_KEPT_BYTES = 1 << 30  # scales of smaller policies are kept, of larger ones computed anew from the mapped state


class Preconditioner:
    """sqrt(D) of a policy folder's optimizer state, parameter by parameter. InputError: no state there, or of other parameters."""

    def __init__(self, folder: str, layout: Layout, device: torch.device) -> None:
        path = Path(folder) / OPTIMIZER_STATE
        self._device = device
        try:
            with safe_open(path, "pt") as opened:
                present = set(opened.keys())
                for name, place in layout.places.items():
                    if f"exp_avg_sq/{name}" not in present:
                        raise InputError(f"{path}: holds no state of parameter {name}; was it trained?")
                    size = opened.get_slice(f"exp_avg_sq/{name}").get_shape()
                    if torch.Size(size).numel() != place.stop - place.start:
                        raise InputError(f"{path}: the state of parameter {name} has another size than the policy's")
                self._squares = {name: opened.get_tensor(f"exp_avg_sq/{name}") for name in layout.places}
        except SafetensorError as error:
            raise InputError(f"{path}: does not open as safetensors ({error})") from None
        self._kept: dict[str, torch.Tensor] = {}
        self._keep = 4 * layout.size <= _KEPT_BYTES

    def scale(self, name: str) -> torch.Tensor:
        """The factors of a parameter's coordinates, flat float32."""
        if name in self._kept:
            return self._kept[name]
        squares = self._squares[name].reshape(-1).to(self._device, torch.float32)
        factors = torch.where(squares > 0, (squares.sqrt() + EPSILON).rsqrt(), 0.0)
        if self._keep:
            self._kept[name] = factors
        return factors
