# Bed (d), a real chat model: SmolLM2-135M-Instruct on short arithmetic in words with its own chat template; see examples/smollm2-135m.

SEED ?= 1
DATA := runs/reproduce/real-tasks/data
RUN := runs/reproduce/real/$(SEED)
STAGES ?= 2
STEPS ?= 10
SEEDS := $(SEED)
DRAW := $(SEED)
ARMS ?= full random learnability cropi
POOL_SIZE := 30
TEST_SIZE := 60
# a tenth of a pool this small would be three prompts of a source
PROBE := 0.3
include examples/smollm2-135m/config.mk
TEST += others
OTHERS := sum product letters bits
TEST_FILE.others := $(DATA)/test.others.jsonl
TRAIN_OPTIONS := --temperature 0.7 --batch $(BATCH) --learning-rate 5e-6 --eval-every 5 --eval-samples 1

$(DATA)/test.others.jsonl: $(DATA)/pool.jsonl $(VALID:%=$(DATA)/valid.%.jsonl) $(VALID:%=$(DATA)/test.%.jsonl)
	cropi-prompts recipe:$(FAMILIES) $(OTHERS:%=--only %) --size 15 --seed 5 $(SHAPED) $(call without,$^) -o $@ $(FORCE)
	@touch $@

# two seeds that run side by side find what they share made
starting-policy: $(POOL) $(foreach name,$(VALID),$(VALID_FILE.$(name))) $(foreach name,$(TEST),$(TEST_FILE.$(name)))
