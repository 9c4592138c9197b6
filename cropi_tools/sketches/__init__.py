"""cropi-project: what decides a sketch, the kernels that make it (numba, torch, Triton), and sketches of whole stores."""
