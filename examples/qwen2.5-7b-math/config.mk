# The paper's setting (arXiv 2510.26491) for Qwen2.5-7B-Instruct on mathematics. What is not set here is in examples/paper.mk, which also
# says what (paper), (released script) and "not published; ours" mean. Not run yet: it needs GPUs.

RUN := runs/qwen2.5-7b-math
# (paper)
MODEL := Qwen/Qwen2.5-7B-Instruct
# what paper_cost.py counts with
PARAMETERS := 7615616512
# (paper, released script)
MAX_TOKENS := 4096
# Prompts: the paper does not say; qwen25-math-cot (released script), the system message of Qwen2.5-Math's evaluation.
FORM := --system 'Please reason step by step, and put your final answer within \boxed{}.'

# Stages, and steps a stage: not published; ours are those of the 1.5B recipe (released script: 2 stages of 10).
STAGES ?= 10
STEPS ?= 100
# Arms and seeds: not published; ours. Fewer than for 1.5B, for their cost.
ARMS ?= cropi full random shuffled
SEEDS ?= 1 2 3

# verl trains, on 8 GPUs (released script): weights, gradients and moments in float32 take 122 GB, more than one GPU has. Its reference is the policy that a
# stage starts from (released script: run_cropi.sh). VERL_PYTHON is the Python of the environment that has it.
VERL_PYTHON ?= python
TRAIN_GPUS ?= 8
TRAIN_ENGINE := --engine verl --verl-python $(VERL_PYTHON) --verl-option trainer.n_gpus_per_node=$(TRAIN_GPUS)
REFERENCE := stage

include examples/paper.mk
