# The paper's setting (arXiv 2510.26491) for DeepSeek-R1-Distill-Qwen-1.5B, which reasons before it answers. What is not set here is in
# examples/paper.mk, which also says what (paper), (released script) and "not published; ours" mean. Not run yet: it needs GPUs.

RUN := runs/r1-distill-1.5b-math
# (paper)
MODEL := deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
# what paper_cost.py counts with
PARAMETERS := 1777088000
# (paper, released script). Reasoning counts: what is cut off before its end has no answer.
MAX_TOKENS := 8192
# Prompts: not published, the released script names data of a form of their own (train_qwen_r1); ours is what the model's authors advise: no system message, and
# this sentence after the question. The model's chat template opens <think>; verifiers read what follows </think>.
FORM := --template '{prompt} Please reason step by step, and put your final answer within \boxed{}.'

# Stages, and steps a stage: not published; ours are those of the 1.5B recipe (released script: 2 stages of 10).
STAGES ?= 10
STEPS ?= 100
# Arms and seeds: not published; ours. Fewer than for Qwen2.5-1.5B, for their cost.
ARMS ?= cropi full random shuffled
SEEDS ?= 1 2 3

# Evaluation: not published; ours is at 0.6, which the model's authors advise. Greedy, it tends to repeat itself without an end.
EVALUATION := --eval-samples 1 --eval-temperature 0.6

include examples/paper.mk
