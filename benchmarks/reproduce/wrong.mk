# Bed (b), wrong references: bed (a) with wrong reference answers in the pool. Of the prompts that the starting policy has a wrong answer to, 40 %
# get the most frequent one as their reference. Which that is, rollouts say that no arm sees.

BED := wrong
SEED ?= 1
POOL := runs/reproduce/tiny/wrong/$(SEED)/pool.jsonl
ARMS ?= full dapo random hardest learnability pass-rate shuffled static complete cropi families oracle
RULE.oracle := random
POOL.oracle := $(dir $(POOL))right.jsonl
SELECT_OPTIONS.oracle := -n 154
include benchmarks/reproduce/families.mk

NOISE := $(dir $(POOL))noise
$(NOISE)/train.rollouts.jsonl: $(DATA)/pool.jsonl $(MODEL_MADE)
	@mkdir -p $(NOISE)
	cropi-rollout --model $(MODEL) --max-tokens $(MAX_TOKENS) --verifier $(VERIFIER) $< -n $(SAMPLES) --seed 1000$(SEED) -o $@ $(FORCE)
	@touch $@

# the pool comes first and the rollouts last: once these are there, all is
$(dir $(POOL))train.rollouts.jsonl: $(NOISE)/train.rollouts.jsonl benchmarks/wrong_references.py
	python benchmarks/wrong_references.py --pool $(DATA)/pool.jsonl --rollouts $< -o $(@D)
	@touch $@

$(POOL): $(dir $(POOL))train.rollouts.jsonl
	@touch $@

# of the targets' families those with a right reference
$(POOL.oracle): $(POOL.families)
	sed -E 's/.*("id": "[^"]*").*/\1/' $(dir $(POOL))wrong.jsonl | grep -v -F -f - $< > $@.part
	@mv $@.part $@
