"""Sample and verify: what cropi-rollout writes, cropi-train learns from and evaluation counts.

`options` is what the two commands were asked. `run` goes from cropi-rollout's options to its output, `regrading` from cropi-verify's, which
grades existing responses again. `sampling` makes rollout records, group after group: requests to an engine, texts from its tokens, grades
from the verifiers while the engine continues. `refreshing` says which prompts to sample again, `imported` reads the rollouts of others,
`metrics` counts accuracy, pass@k and lengths, `estimate` measures on a few prompts what all of them will cost, `writing` commits. A sample's
seed follows from (run seed, prompt id, sample number), so it depends on neither batch, shard, order nor resume.
"""
