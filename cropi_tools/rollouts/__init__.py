"""Sample and verify: what cropi-rollout writes, cropi-train learns from and evaluation counts.

`plan` goes from options to output. `sampling` makes rollout records, group after group: requests to an engine, texts from its tokens, grades
from the verifiers while the engine goes on. `regrading` grades existing responses again, `refreshing` says which prompts to sample anew,
`tally` counts accuracy, pass@k and lengths, `estimate` measures on a few prompts what all of them will cost, `writing` commits. A sample's
seed follows from (run seed, prompt id, sample number), so it depends on neither batch, shard, order nor resume.
"""
