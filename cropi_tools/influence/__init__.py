"""The heart: the off-policy gradient of every prompt, its sketch, its influence on a target, and the choice that follows. It shares
the objective and the policy rooms with training and knows no engine.
"""
