"""cropi-prompts: data sets of any form in, templates, repeated questions, generated families; prompts out to verl and TRL."""
