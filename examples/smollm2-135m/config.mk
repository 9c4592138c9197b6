# A real chat model on two CPU cores: SmolLM2-135M-Instruct on short arithmetic in words, CROPI beside random selection, two stages.
# README.md beside this file says how long it takes and what it can and cannot show.

HERE := $(dir $(lastword $(MAKEFILE_LIST)))
DATA ?= runs/smollm2-135m/data
START := runs/smollm2-135m/P0

RUN ?= runs/smollm2-135m
MODEL := $(START)
MODEL_MADE := $(START)/config.json
POOL := $(DATA)/pool.jsonl
VALID := lcm gcd
TEST := lcm gcd
VALID_FILE.lcm := $(DATA)/valid.lcm.jsonl
VALID_FILE.gcd := $(DATA)/valid.gcd.jsonl
TEST_FILE.lcm := $(DATA)/test.lcm.jsonl
TEST_FILE.gcd := $(DATA)/test.gcd.jsonl

STAGES ?= 2
STEPS ?= 6
ARMS ?= random cropi
SEEDS ?= 1
SAMPLES ?= 8
VALID_SAMPLES ?= 16
BATCH ?= 8
MAX_TOKENS := 32
# at 1.0 this model is incoherent, and a policy is measured at the temperature it is sampled at
ROLLOUT_TEMPERATURE := 0.7
GRAD_OPTIONS := --policy-temperature 0.7
VERIFIER := maths
STORE_OPTIONS := --dim 8192
TRAIN_OPTIONS := --temperature 0.7 --batch $(BATCH) --learning-rate 5e-6 --eval-every $(STEPS) --eval-samples 1

# prompts of each line of families.jsonl, of each target for validation, and for testing
POOL_SIZE ?= 16
VALID_SIZE ?= 24
TEST_SIZE ?= 40
# worked examples as chat turns, without which the model does not keep to the form
SHAPED := --system "Solve the task in one short line and end with: The answer is X." --messages $(HERE)examples.json
FAMILIES := $(HERE)families.jsonl
without = $(1:%=--exclude %)

$(MODEL_MADE): $(HERE)model.py
	python $< -o $(START)
	@touch $@

$(DATA)/pool.jsonl: $(FAMILIES) $(HERE)examples.json
	@mkdir -p $(DATA)
	cropi-prompts recipe:$(FAMILIES) --size $(POOL_SIZE) --seed 1 $(SHAPED) -o $@ $(FORCE)
	@touch $@

$(DATA)/valid.%.jsonl: $(DATA)/pool.jsonl
	cropi-prompts recipe:$(FAMILIES) --only $* --size $(VALID_SIZE) --seed 2 $(SHAPED) $(call without,$^) -o $@ $(FORCE)
	@touch $@

$(DATA)/test.%.jsonl: $(DATA)/pool.jsonl $(DATA)/valid.%.jsonl
	cropi-prompts recipe:$(FAMILIES) --only $* --size $(TEST_SIZE) --seed 3 $(SHAPED) $(call without,$^) -o $@ $(FORCE)
	@touch $@
