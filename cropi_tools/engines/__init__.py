"""Sampling behind one protocol: prompts' token ids in; token ids, log-probabilities of the distribution really sampled and finish
reasons out. A sample depends on its own seed, which follows from (run seed, prompt id, sample number), and on nothing it is batched
with. Engines know no rewards and no influence.
"""
