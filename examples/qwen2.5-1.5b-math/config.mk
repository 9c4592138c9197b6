# The paper's main setting (arXiv 2510.26491): Qwen2.5-1.5B-Instruct on mathematics. What is not set here is in examples/paper.mk, which also
# says what (paper), (released script) and "not published; ours" mean. Not run yet: it needs GPUs.

RUN := runs/qwen2.5-1.5b-math
# (paper)
MODEL := Qwen/Qwen2.5-1.5B-Instruct
# what paper_cost.py counts with
PARAMETERS := 1543714304
# (paper, released script)
MAX_TOKENS := 2048
# Prompts: the paper does not say; qwen25-math-cot (released script), the system message of Qwen2.5-Math's evaluation.
FORM := --system 'Please reason step by step, and put your final answer within \boxed{}.'

# Stages, and steps a stage, of each result: not published; ours are ten times 100, since the paper's curves end at 1000 steps (released script: 2 stages of 10).
STAGES ?= 10
STEPS ?= 100
# The paper's arms, and shuffled, the control: ours
ARMS ?= cropi full random shuffled static learnability pass-rate
# Seeds: not published; ours. Five matched seeds resolve a difference of about one point.
SEEDS ?= 1 2 3 4 5

include examples/paper.mk
