"""cropi-tools: data selection for reinforcement learning with verifiable rewards, by off-policy influence (CROPI, arXiv 2510.26491).

The package imports nothing heavy; `docs/architecture.md` says which room holds what.
"""

__version__ = "0.1.0"
