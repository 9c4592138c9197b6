"""cropi-score: the influence of every prompt on a target, and how far it can be trusted."""
