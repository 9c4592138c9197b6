"""cropi-embed: what a policy makes of a prompt before it answers."""
