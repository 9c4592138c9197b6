"""cropi-grad: the off-policy gradient of every prompt, in three ways (reference, per sample, forward mode), as a store of sketches and
inner products or as a mean.
"""
