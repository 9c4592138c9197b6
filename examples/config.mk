# The values of a run. Every one is explained in docs/curriculum.md; `make -n curriculum CONFIG=THIS_FILE` shows what they come to.
# `?=` lets the command line or the environment say otherwise; lines that begin with # have the default.

# Where everything of the run is written, the starting policy (a folder, or ORG/NAME of the Hugging Face hub), and the pool to select from.
RUN := runs/mine
MODEL := Qwen/Qwen2.5-0.5B-Instruct
POOL := $(RUN)/data/pool.jsonl

# The targets: for each name in VALID the prompts that influence is taken on, for each in TEST those that training is evaluated on.
VALID := target
VALID_FILE.target := $(RUN)/data/valid.target.jsonl
TEST := target
TEST_FILE.target := $(RUN)/data/test.target.jsonl

STAGES ?= 2
STEPS ?= 50
ARMS ?= random full cropi
SEEDS ?= 1 2 3

# RATIO := 0.1
# SAMPLES := 8
# VALID_SAMPLES := 32
# MAX_TOKENS := 1024
# ROLLOUT_TEMPERATURE := 1.0
# VERIFIER :=
# DRAW := 0
# REFRESH :=
# PROBE :=
# SHORTLIST := 2
# FRESH_VALID :=
# AUDIT :=
# CARRY := weights
# GPUS ?= 1

# More options of the commands.
# ROLLOUT_OPTIONS :=
# GRAD_OPTIONS :=
# STORE_OPTIONS :=
# TRAIN_OPTIONS := --eval-every 10
# REPORT_OPTIONS :=
