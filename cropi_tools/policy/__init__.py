"""The policy as a model: loading it, turning prompts into its tokens, and the log-probabilities of given responses with their
gradient graph. Sampling is the engines' room; what the log-probabilities are used for is the objective's.
"""
