# The demo: a policy of 0.6 million parameters, ten families of short tasks, two targets; minutes on two CPU cores.
# README.md beside this file says what the starting policy is and what the result can and cannot show.

DATA := runs/tiny/data
START := runs/tiny/P0
include examples/tiny/tasks.mk

RUN := runs/tiny
MODEL := $(START)
MODEL_MADE := $(START)/manifest.json
POOL := $(DATA)/pool.jsonl
VALID := reverse gcd
TEST := reverse gcd
VALID_FILE.reverse := $(DATA)/valid.reverse.jsonl
VALID_FILE.gcd := $(DATA)/valid.gcd.jsonl
TEST_FILE.reverse := $(DATA)/test.reverse.jsonl
TEST_FILE.gcd := $(DATA)/test.gcd.jsonl

STAGES ?= 2
STEPS ?= 25
ARMS ?= random full cropi
SEEDS ?= 1 2 3
SAMPLES := 8
VALID_SAMPLES := 16
MAX_TOKENS := 8
VERIFIER := exact
STORE_OPTIONS := --dim 4096
TRAIN_OPTIONS := --batch 32 --learning-rate 1.5e-4 --betas 0.9,0.99 --eval-every 5 --eval-samples 2 --eval-temperature 1.0
