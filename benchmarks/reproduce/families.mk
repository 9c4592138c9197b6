# Bed (a), families: the demo's tasks and policy, four stages. Every seed has a starting policy (one of three), a draw of rollouts and a run.
# plan.toml says what is compared and why.

SEED ?= 1
BED ?= families
PLACE := runs/reproduce/tiny
DATA := $(PLACE)/data
WARMUP_SEED := $(shell echo $$((($(SEED) - 1) % 3)))
START := $(PLACE)/P$(WARMUP_SEED)
include examples/tiny/tasks.mk

# what no arm is trained for: a few questions of each of the other families
OTHERS := sum product lcm sequence equation bits base binary
$(DATA)/test.others.jsonl: $(TINY_TASKS)
	cropi-prompts recipe:$(RECIPE) $(OTHERS:%=--only %) --size 8 --seed 5 $(call without,$^) -o $@ $(FORCE)
	@touch $@
$(DATA)/warmup.jsonl: $(DATA)/test.others.jsonl

RUN := runs/reproduce/$(BED)/$(SEED)
MODEL := $(START)
MODEL_MADE := $(START)/manifest.json
POOL ?= $(DATA)/pool.jsonl
VALID := reverse gcd
TEST := reverse gcd others
VALID_FILE.reverse := $(DATA)/valid.reverse.jsonl
VALID_FILE.gcd := $(DATA)/valid.gcd.jsonl
TEST_FILE.reverse := $(DATA)/test.reverse.jsonl
TEST_FILE.gcd := $(DATA)/test.gcd.jsonl
TEST_FILE.others := $(DATA)/test.others.jsonl

STAGES ?= 4
STEPS ?= 25
SEEDS := $(SEED)
DRAW := $(SEED)
PROBE := 0.1
SHORTLIST := 2
SAMPLES := 8
VALID_SAMPLES := 16
MAX_TOKENS := 8
VERIFIER := exact
STORE_OPTIONS := --dim 4096
TRAIN_OPTIONS := --batch 32 --learning-rate 1.5e-4 --betas 0.9,0.99 --eval-every 5 --eval-samples 2 --eval-temperature 1.0

ARMS ?= full dapo random hardest learnability pass-rate shuffled static complete cropi families
RULE.dapo := full
TRAIN_OPTIONS.dapo := --dynamic-sampling 10
# a random tenth (of the pool's 1540) out of the targets' families alone
RULE.families := random
POOL.families := $(PLACE)/$(BED)/$(SEED)/targets.jsonl
SELECT_OPTIONS.families := -n 154

$(POOL.families): $(POOL)
	@mkdir -p $(@D)
	grep -E '"source": "(reverse|gcd)"' $< > $@.part
	@mv $@.part $@
