# The prompts of the tiny test bed in the folder DATA, and its starting policy, the folder START. Validation and test files are
# DATA/valid.NAME.jsonl and DATA/test.NAME.jsonl for each of TINY_TARGETS.
#
# Every set of questions is kept apart from those before it: the pool, then validation and test of each target, then what the
# warm-up learns from. Both targets are held out always, so that the choice of a target changes neither pool nor warm-up.

TINY := $(dir $(lastword $(MAKEFILE_LIST)))
RECIPE := $(TINY)families.jsonl
TINY_TARGETS := reverse gcd
# prompts of each of the 22 levels; every target has 2
POOL_SIZE ?= 70
VALID_SIZE ?= 40
TEST_SIZE ?= 120
WARMUP_SIZE ?= 900
WARMUP_SEED ?= 0

TINY_TASKS := $(DATA)/pool.jsonl $(TINY_TARGETS:%=$(DATA)/valid.%.jsonl) $(TINY_TARGETS:%=$(DATA)/test.%.jsonl)
without = $(1:%=--exclude %)

$(DATA)/pool.jsonl: $(RECIPE)
	@mkdir -p $(DATA)
	cropi-prompts recipe:$(RECIPE) --size $(POOL_SIZE) --seed 1 -o $@ $(FORCE)
	@touch $@

$(DATA)/valid.%.jsonl: $(DATA)/pool.jsonl
	cropi-prompts recipe:$(RECIPE) --only $* --size $(VALID_SIZE) --seed 2 $(call without,$^) -o $@ $(FORCE)
	@touch $@

$(DATA)/test.%.jsonl: $(DATA)/pool.jsonl $(DATA)/valid.%.jsonl
	cropi-prompts recipe:$(RECIPE) --only $* --size $(TEST_SIZE) --seed 3 $(call without,$^) -o $@ $(FORCE)
	@touch $@

$(DATA)/warmup.jsonl: $(TINY_TASKS)
	cropi-prompts recipe:$(RECIPE) --size $(WARMUP_SIZE) --seed 4 $(call without,$^) -o $@ $(FORCE)
	@touch $@

$(START)/manifest.json: $(DATA)/warmup.jsonl $(TINY)warmup.py
	python $(TINY)warmup.py $< --seed $(WARMUP_SEED) -o $(START) $(FORCE)
	@touch $@
