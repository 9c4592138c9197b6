# The curriculum: stages of rollout, gradient, score, select, train, for every arm and seed of a run.
#
#   RUN/start/                 rollouts of the starting policy, its gradients and scores: stage 1 of all arms
#   RUN/ARM/SEED/K/            stage K of an arm: gradients and scores (cropi, K > 1), selection, policy
#   RUN/report.html            the page
#
# Targets are manifests: regular files that are written last. `make -n` shows what is left to do; a rerun goes on after a kill; a
# larger STAGES adds stages. When a value of CONFIG changes, every command is asked again: those it does not touch say "up to
# date", the others refuse and say what differs; FORCE=--force replaces their results.
#
# What a CONFIG sets (examples/tiny/config.mk is a short one, examples/qwen2.5-1.5b-math/config.mk a full one):
#   RUN MODEL POOL             the run's folder, the starting policy, the pool's prompts
#   VALID TEST                 names of validation and test sets; their prompts are VALID_FILE.NAME and TEST_FILE.NAME
#   STAGES STEPS ARMS SEEDS    stages, steps a stage, arms (cropi full random static shuffled learnability pass-rate), seeds
RATIO ?= 0.1
SAMPLES ?= 8
VALID_SAMPLES ?= 32
MAX_TOKENS ?= 1024
ROLLOUT_TEMPERATURE ?= 1.0
VERIFIER ?= maths
GRAD_OPTIONS ?=
STORE_OPTIONS ?=
TRAIN_OPTIONS ?=
GPUS ?= 1
FORCE ?=

SETTINGS = $(foreach name,MODEL POOL VALID TEST STEPS RATIO SAMPLES VALID_SAMPLES MAX_TOKENS ROLLOUT_TEMPERATURE VERIFIER GRAD_OPTIONS \
  STORE_OPTIONS TRAIN_OPTIONS $(VALID:%=VALID_FILE.%) $(TEST:%=TEST_FILE.%),$(name)=$($(name)))
# remembered where the run lies, and renewed only when it differs (never by `make -n`)
REMEMBERED := $(RUN)/settings
ifeq ($(findstring n,$(filter-out --%,$(firstword $(MAKEFLAGS)))),)
$(shell mkdir -p $(RUN))
ifneq ($(strip $(file <$(REMEMBERED))),$(strip $(SETTINGS)))
$(file >$(REMEMBERED),$(SETTINGS))
endif
endif
$(REMEMBERED): ;

# -- shards: with GPUS=n every part of a step on its own GPU, at once
# $(call shards,BASE,EXTENSION): the files of a sharded output
shards = $(if $(filter 1,$(GPUS)),$(1)$(2),$(foreach i,$(shell seq $(GPUS)),$(1).$(i)-of-$(GPUS)$(2)))
# $(call in-shards,COMMAND,BASE,EXTENSION): run COMMAND for every shard; a stop of make stops them all
define in-shards
$(if $(filter 1,$(GPUS)),$(1) -o $(2)$(3) $(FORCE),pids=(); trap 'kill "$${pids[@]}" 2>/dev/null' TERM; \
for i in $$(seq $(GPUS)); do CUDA_VISIBLE_DEVICES=$$((i - 1)) $(1) --shard $$i/$(GPUS) -o $(2).$$i-of-$(GPUS)$(3) $(FORCE) & pids+=($$!); done; \
code=0; for pid in "$${pids[@]}"; do wait $$pid || code=$$?; done; (exit $$code))
@touch $(call shards,$(2),$(3)$(4))
endef

# -- names
S := $(RUN)/start
NUMBERS := $(shell seq $(STAGES))
cells = $(foreach arm,$(1),$(foreach seed,$(SEEDS),$(foreach k,$(2),$(RUN)/$(arm)/$(seed)/$(k))))
part = $(word $(2),$(subst /, ,$(patsubst $(RUN)/%,%,$(1))))
before = $(RUN)/$(call part,$(1),1)/$(call part,$(1),2)/$(words $(wordlist 2,$(call part,$(1),3),$(NUMBERS)))
first = $(filter 1,$(call part,$(1),3))
# $(call policy,CELL): the policy a stage starts from; RUN/start is stage 1 of every arm
policy = $(if $(filter $(S),$(1))$(call first,$(1)),$(MODEL),$(call before,$(1))/policy)
policy-made = $(if $(filter $(S),$(1))$(call first,$(1)),$(MODEL_MADE),$(call before,$(1))/policy/manifest.json)
MODEL_MADE ?= $(MODEL)/config.json
# $(call scores,CELL): where the scores a stage selects by are
scores = $(strip $(if $(filter full random,$(call part,$(1),1)),,$(if $(filter cropi,$(call part,$(1),1)),$(if $(call first,$(1)),$(S),$(1)),$(S))))
# the seed of a cell: of its seed and stage, the same for all arms
cell-seed = $(call part,$(1),2)00$(call part,$(1),3)
rule = $(if $(filter cropi static,$(1)),influence,$(1))

ALL := $(call cells,$(ARMS),$(NUMBERS))
SCORED := $(S) $(if $(filter cropi,$(ARMS)),$(call cells,cropi,$(filter-out 1,$(NUMBERS))))
TRAIN_ROLLOUTS := $(call shards,$(S)/train.rollouts,.jsonl)
STORES = $(call shards,$(1)/grads,.zarr)

.PHONY: starting-policy curriculum report
starting-policy: $(MODEL_MADE)
curriculum: $(ALL:%=%/policy/manifest.json)
report: $(RUN)/report.html
	@cropi-report $(RUN)
	@echo "page: $(RUN)/report.html   picture: $(RUN)/report.png"

$(RUN)/report.html: $(ALL:%=%/policy/manifest.json)
	cropi-report $(RUN) -o $@ --png $(RUN)/report.png --force --quiet >/dev/null

.SECONDEXPANSION:

# -- once: rollouts of the starting policy
ROLLOUT = cropi-rollout --model $(MODEL) --max-tokens $(MAX_TOKENS) --temperature $(ROLLOUT_TEMPERATURE) --verifier $(VERIFIER)
$(TRAIN_ROLLOUTS:%=%.manifest.json) &: $(POOL) $(MODEL_MADE) $(REMEMBERED)
	@mkdir -p $(S)
	$(call in-shards,$(ROLLOUT) $(POOL) -n $(SAMPLES) --seed 0,$(S)/train.rollouts,.jsonl,.manifest.json)

define valid-rules
$(S)/valid-$(1).rollouts.jsonl.manifest.json: $(VALID_FILE.$(1)) $(MODEL_MADE) $(REMEMBERED)
	@mkdir -p $(S)
	$(ROLLOUT) $(VALID_FILE.$(1)) -n $(VALID_SAMPLES) --seed 1 -o $(S)/valid-$(1).rollouts.jsonl $(FORCE)
	@touch $$@

$(SCORED:%=%/valid-$(1).mean.safetensors.manifest.json): %/valid-$(1).mean.safetensors.manifest.json: $(S)/valid-$(1).rollouts.jsonl.manifest.json $$$$(call policy-made,$$$$*)
	@mkdir -p $$*
	cropi-grad --model $$(call policy,$$*) $(S)/valid-$(1).rollouts.jsonl --mean $(GRAD_OPTIONS) -o $$*/valid-$(1).mean.safetensors $(FORCE)
	@touch $$@
endef
$(foreach name,$(VALID),$(eval $(call valid-rules,$(name))))

# -- each stage
define grad-rule
$(patsubst %,%/manifest.json,$(call STORES,$(1))) &: $(TRAIN_ROLLOUTS:%=%.manifest.json) $(VALID:%=$(1)/valid-%.mean.safetensors.manifest.json) $(call policy-made,$(1))
	$$(call in-shards,cropi-grad --model $(call policy,$(1)) $(TRAIN_ROLLOUTS) $(foreach name,$(VALID),--against $(name)=$(1)/valid-$(name).mean.safetensors) $(GRAD_OPTIONS) $(STORE_OPTIONS),$(1)/grads,.zarr,/manifest.json)
endef
$(foreach cell,$(SCORED),$(eval $(call grad-rule,$(cell))))

$(SCORED:%=%/scores.jsonl.manifest.json): %/scores.jsonl.manifest.json: $$(patsubst $$(percent),$$(percent)/manifest.json,$$(call STORES,$$*))
	cropi-score $(call STORES,$*) -o $*/scores.jsonl $(FORCE)
	@touch $@
percent := %

$(ALL:%=%/selected.jsonl.manifest.json): %/selected.jsonl.manifest.json: $(POOL) $(REMEMBERED) $$(addsuffix /scores.jsonl.manifest.json,$$(call scores,$$*))
	@mkdir -p $*
	cropi-select $(addsuffix /scores.jsonl,$(call scores,$*)) --prompts $(POOL) --by $(call rule,$(call part,$*,1)) --ratio $(RATIO) --seed $(call cell-seed,$*) -o $*/selected.jsonl $(FORCE)
	@touch $@

$(ALL:%=%/policy/manifest.json): %/policy/manifest.json: %/selected.jsonl.manifest.json $(foreach name,$(TEST),$(TEST_FILE.$(name))) $$(call policy-made,$$*)
	cropi-train --model $(call policy,$*) $*/selected.jsonl --steps $(STEPS) -n $(SAMPLES) --max-tokens $(MAX_TOKENS) --verifier $(VERIFIER) --seed $(call cell-seed,$*) $(foreach name,$(TEST),--eval $(name)=$(TEST_FILE.$(name))) $(TRAIN_OPTIONS) -o $*/policy $(FORCE)
	@touch $@
