# The paper's setting (arXiv 2510.26491): Qwen2.5-1.5B-Instruct on mathematics, every value as published, and where the paper leaves a
# choice, "not published" beside ours. Not run yet: it needs GPUs. README.md beside this file says how to get model and data.

RUN := runs/qwen2.5-1.5b-math
MODEL := Qwen/Qwen2.5-1.5B-Instruct
POOL := $(RUN)/data/pool.jsonl

# Targets: GSM8K and MATH, at most 100 validation prompts each (paper). Which 100: not published; ours are the first 100 of the sets named in
# README.md. Tests: the targets, and Gaokao2023en, AMC23, OlympiadBench, AIME24 as untargeted ones (paper).
VALID := gsm8k math
VALID_FILE.gsm8k := $(RUN)/data/valid.gsm8k.jsonl
VALID_FILE.math := $(RUN)/data/valid.math.jsonl
TEST := gsm8k math gaokao2023en amc23 olympiadbench aime24
TEST_FILE.gsm8k := $(RUN)/data/test.gsm8k.jsonl
TEST_FILE.math := $(RUN)/data/test.math.jsonl
TEST_FILE.gaokao2023en := $(RUN)/data/test.gaokao2023en.jsonl
TEST_FILE.amc23 := $(RUN)/data/test.amc23.jsonl
TEST_FILE.olympiadbench := $(RUN)/data/test.olympiadbench.jsonl
TEST_FILE.aime24 := $(RUN)/data/test.aime24.jsonl

# Stages and steps a stage: not published for each result (the released script's defaults are 2 stages of 10 steps; the curves run to 1000 steps).
STAGES ?= 10
STEPS ?= 100
ARMS ?= cropi full random shuffled static learnability pass-rate
# Seeds: not published. Five matched seeds resolve a difference of about one point.
SEEDS ?= 1 2 3 4 5

RATIO := 0.1
SAMPLES := 8
VALID_SAMPLES := 32
# scoring rollouts of the starting policy, for all stages
ROLLOUT_TEMPERATURE := 0.5
MAX_TOKENS := 2048
VERIFIER := maths
# vLLM samples (pip install 'cropi-tools[vllm]'); ENGINE=transformers does without
ENGINE ?= vllm
ROLLOUT_OPTIONS := --engine $(ENGINE)

# Behavior probabilities recomputed, token ratio, no clip (paper). Sketch of 32768 dimensions; the paper keeps 15M coordinates (1 %) and projects with a
# Gaussian: `STORE_OPTIONS := --sketch sparse-jl --keep 0.01 --dim 32768` is that with signs for Gaussians. Scores do not use the sketch here: they are exact.
GRAD_OPTIONS := --behavior $(MODEL) --weighting token
STORE_OPTIONS := --sketch countsketch --dim 32768

# GRPO: 128 prompts x 8 at temperature 1, rate 1e-6, k3 KL .001, entropy bonus .001, clip .2, token mean (paper, and verl's defaults for the rest: constant rate,
# gradient norm 1, weight decay .01, one update a batch) are the preset's values. Reference of the KL term: not published; ours is the starting policy in all
# stages. Evaluation: temperature and samples not published; ours is greedy, once, every 20 steps.
TRAIN_OPTIONS := --preset paper --reference start --eval-every 20 --eval-samples 1 --eval-temperature 0 --save-every 10 --engine $(ENGINE)
