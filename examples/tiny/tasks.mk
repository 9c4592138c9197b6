# The tiny test bed's prompts and starting policy, as targets of make. Include it with DATA and START set to the folders
# to write; the commands come from PATH. Every set of questions is kept apart from those before it:
# pool, then validation and test of each target, then what the warm-up learns from.

TINY := $(dir $(lastword $(MAKEFILE_LIST)))
RECIPE := $(TINY)families.jsonl
PYTHON ?= python

# sources that may be a target; all are reserved, so that the choice of targets changes neither warm-up nor pool
TINY_TARGETS := reverse gcd lcm
# prompts a level: 22 levels make the pool, 2 levels a target
POOL_SIZE ?= 70
VALID_SIZE ?= 40
TEST_SIZE ?= 120
WARMUP_SIZE ?= 900
TINY_HELD_OUT := $(TINY_TARGETS:%=$(DATA)/valid.%.jsonl) $(TINY_TARGETS:%=$(DATA)/test.%.jsonl)

$(DATA):
	mkdir -p $@

$(DATA)/pool.jsonl: $(RECIPE) | $(DATA)
	cropi-prompts recipe:$< --size $(POOL_SIZE) --seed 1 -o $@ --force

$(DATA)/valid.%.jsonl: $(DATA)/pool.jsonl
	cropi-prompts recipe:$(RECIPE) --only $* --size $(VALID_SIZE) --seed 2 --exclude $< -o $@ --force

$(DATA)/test.%.jsonl: $(DATA)/pool.jsonl $(DATA)/valid.%.jsonl
	cropi-prompts recipe:$(RECIPE) --only $* --size $(TEST_SIZE) --seed 3 $(^:%=--exclude %) -o $@ --force

$(DATA)/warmup.jsonl: $(DATA)/pool.jsonl $(TINY_HELD_OUT)
	cropi-prompts recipe:$(RECIPE) --size $(WARMUP_SIZE) --seed 4 $(^:%=--exclude %) -o $@ --force

$(START)/manifest.json: $(DATA)/warmup.jsonl $(TINY)warmup.py
	$(PYTHON) $(TINY)warmup.py $< -o $(START) --force
