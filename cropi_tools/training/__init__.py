"""The GRPO loop: rollout, reward, advantage, objective, step; its exact-resume state and its evaluation. It samples through the same
engines and optimizes the same objective as the influence room measures.
"""
