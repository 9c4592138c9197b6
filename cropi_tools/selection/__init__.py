"""cropi-select: the rules that turn scores into a selection."""
