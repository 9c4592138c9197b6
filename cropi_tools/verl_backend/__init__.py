"""cropi-train --engine verl: our options in verl's words, the run, and the policy brought back."""
