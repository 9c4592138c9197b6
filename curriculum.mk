# The curriculum: stages of rollout, gradient, score, select, train, for every arm and seed of a run.
#
#   RUN/start/                 rollouts of the starting policy, its gradients and scores: stage 1 of all arms
#   RUN/ARM/SEED/K/            stage K of an arm: gradients and scores (cropi and shuffled, K > 1), selection, policy
#   RUN/report.html            the page
#
# Targets are manifests: regular files that are written last. `make -n` shows what is left to do; a rerun resumes after a kill; a
# larger STAGES adds stages. RUN/settings/ remembers what each kind of step was asked. When a value of CONFIG changes, the steps it
# is about are asked again: they refuse and say what differs; FORCE=--force replaces their results and what was made of them.
#
# docs/curriculum.md explains the values that a CONFIG sets.
HERE := $(dir $(lastword $(MAKEFILE_LIST)))
VALID ?=
TEST ?=
RATIO ?= 0.1
SAMPLES ?= 8
VALID_SAMPLES ?= 32
MAX_TOKENS ?= 1024
ROLLOUT_TEMPERATURE ?= 1.0
VERIFIER ?=
ROLLOUT_OPTIONS ?=
REFRESH ?=
DRAW ?= 0
PROBE ?=
SHORTLIST ?= 2
FRESH_VALID ?=
AUDIT ?=
GRAD_OPTIONS ?=
STORE_OPTIONS ?=
TRAIN_OPTIONS ?=
REPORT_OPTIONS ?=
CARRY ?= weights
GPUS ?= 1
CUDA_VISIBLE_DEVICES ?=
FORCE ?=
SUBMIT ?=

$(if $(file <$(lastword $(MAKEFILE_LIST))),,$(error GNU make 4.2 or newer is needed, this is $(MAKE_VERSION)))
# -- values that can only be mistakes, told before anything starts. `value` warns of no name that is not set.
$(foreach name,RUN MODEL POOL STAGES STEPS ARMS SEEDS,$(if $(strip $(value $(name))),,$(error $(CONFIG) does not set $(name); see docs/curriculum.md)))
empty :=
space := $(empty) $(empty)
# $(call whole,VALUE): VALUE if it is one whole number above 0
not-digits = $(subst 0,,$(subst 1,,$(subst 2,,$(subst 3,,$(subst 4,,$(subst 5,,$(subst 6,,$(subst 7,,$(subst 8,,$(subst 9,,$(1)))))))))))
whole = $(if $(call not-digits,$(strip $(1))),,$(filter-out 0%,$(strip $(1))))
ARMS_KNOWN := cropi complete full random static shuffled learnability hardest pass-rate
# an arm of the config's own selects as the arm RULE.NAME does; POOL.NAME, SELECT_OPTIONS.NAME and TRAIN_OPTIONS.NAME are what it has of its own
of-arm = $(if $(strip $(value $(1).$(2))),$($(1).$(2)))
kind-of-arm = $(strip $(or $(call of-arm,RULE,$(1)),$(1)))
# $(call arms-of,KINDS): the arms that select as one of these
arms-of = $(strip $(foreach arm,$(ARMS),$(if $(filter $(1),$(call kind-of-arm,$(arm))),$(arm))))
OWN_POOLS := $(strip $(foreach arm,$(ARMS),$(if $(call of-arm,POOL,$(arm)),$(arm))))
$(foreach name,STAGES STEPS GPUS SAMPLES VALID_SAMPLES MAX_TOKENS,$(if $(call whole,$($(name))),,$(error $(name)=$($(name)): expected a \
  whole number above 0)))
$(if $(call not-digits,$(subst $(space),,$(SEEDS))),$(error SEEDS=$(SEEDS): expected whole numbers, such as 1 2 3))
$(if $(call whole,$(DRAW))$(filter 0,$(DRAW)),$(if $(word 2,$(DRAW)),$(error DRAW=$(DRAW): expected one whole number)),$(error DRAW=$(DRAW): expected a \
  whole number))
$(foreach arm,$(ARMS),$(if $(filter-out $(ARMS_KNOWN),$(call kind-of-arm,$(arm))),$(error $(if $(call of-arm,RULE,$(arm)),RULE.$(arm)=$(call \
  of-arm,RULE,$(arm)): there is no arm $(call of-arm,RULE,$(arm)),ARMS=$(ARMS): there is no arm $(arm)), only $(ARMS_KNOWN)$(if $(call \
  of-arm,RULE,$(arm)),, and those with a RULE of their own))))
$(if $(filter start settings,$(ARMS)),$(error ARMS=$(ARMS): start and settings are folders of the run; give the arm another name))
$(if $(findstring /,$(ARMS))$(findstring %,$(ARMS)),$(error ARMS=$(ARMS): an arm is a folder of the run; give it a name without / and %))
$(if $(filter-out $(words $(ARMS)),$(words $(sort $(ARMS)))),$(error ARMS=$(ARMS): an arm stands there twice; name each once))
$(foreach arm,$(ARMS),$(if $(call of-arm,RULE,$(arm)),$(if $(filter $(ARMS_KNOWN),$(arm)),$(error RULE.$(arm)=$(call of-arm,RULE,$(arm)): $(arm) is a way \
  of selecting already; give the arm another name))$(if $(word 2,$(call of-arm,RULE,$(arm))),$(error RULE.$(arm)=$(call of-arm,RULE,$(arm)): expected one arm))))
$(foreach arm,$(OWN_POOLS),$(if $(filter full random,$(call kind-of-arm,$(arm))),,$(error POOL.$(arm)=$(call of-arm,POOL,$(arm)): $(arm) selects by \
  scores, which are of POOL; only RULE.$(arm) full and random can have a pool of their own)))
$(if $(filter-out --force,$(FORCE))$(word 2,$(FORCE)),$(error FORCE=$(FORCE): expected --force, or nothing))
$(foreach name,AUDIT FRESH_VALID,$(if $(filter-out 1,$($(name)))$(word 2,$($(name))),$(error $(name)=$($(name)): expected 1, or nothing)))
$(if $(strip $(AUDIT)),$(if $(strip $(VALID)),,$(error AUDIT=$(AUDIT): there is no target to pull away from; set VALID)))
$(if $(strip $(VALID))$(findstring --against,$(STORE_OPTIONS)),,$(if $(call arms-of,cropi complete static shuffled),$(error VALID=: \
  influence is that on a target, which ARMS=$(call arms-of,cropi complete static shuffled) needs; name one)))
$(if $(filter-out weights full,$(CARRY))$(word 2,$(CARRY)),$(error CARRY=$(CARRY): expected weights or full))

# $(call number,VALUE): VALUE if it is a decimal number that is not negative, such as 0.1
number = $(if $(call not-digits,$(subst .,,$(strip $(1))))$(word 4,$(subst ., . ,$(strip $(1))))$(filter .%,$(strip $(1))),,$(strip $(1)))
$(foreach name,PROBE SHORTLIST,$(if $(strip $($(name))),$(if $(call number,$($(name))),,$(error $(name)=$($(name)): expected a number, such as 0.1))))
$(if $(PROBE),$(if $(REFRESH),$(error PROBE=$(PROBE) samples afresh at every stage and REFRESH=$(REFRESH) renews old rollouts; leave one of them out)))
$(if $(call arms-of,complete),$(if $(PROBE),,$(error ARMS=$(ARMS): complete scores the whole pool where cropi probes, and PROBE is not set; leave it out)))

$(foreach kind,VALID TEST,$(foreach name,$($(kind)),$(if $(strip $(value $(kind)_FILE.$(name))),,$(error $(kind)=$($(kind)): the prompts of \
  $(name) are not told; set $(kind)_FILE.$(name)))))
# a name of the hub is no file to wait for
MODEL_MADE ?= $(wildcard $(MODEL)/config.json)
hub-name = $(if $(filter /% .% ~%,$(MODEL)),,$(filter 2,$(words $(subst /, ,$(firstword $(subst @, ,$(MODEL)))))))
$(if $(MODEL_MADE)$(if $(wildcard $(MODEL)),,$(hub-name)),,$(error MODEL=$(MODEL): no policy folder (it would hold config.json), no name of the \
  hub's (ORG/NAME), and MODEL_MADE names nothing that a rule makes))
# $(call check-files,NAME): every file that the value NAME names is there, or some rule makes it: `make -n` knows. CHECKING is set for that one.
makeable = $(shell MAKEFLAGS='n -- $(subst ','\'',$(MAKEOVERRIDES))' $(MAKE) -f $(firstword $(MAKEFILE_LIST)) CHECKING=1 $(1) >/dev/null 2>&1 && echo yes)
check-files = $(foreach file,$($(1)),$(if $(wildcard $(file))$(call makeable,$(file)),,$(error $(1)=$($(1)): there is no file $(file), and no rule \
  that makes it)))
$(if $(value CHECKING),,$(foreach name,MODEL_MADE POOL $(OWN_POOLS:%=POOL.%) $(VALID:%=VALID_FILE.%) $(TEST:%=TEST_FILE.%),$(call check-files,$(name))))

# -- how a step runs: here, or, with SUBMIT and `make -n`, it is shown as SUBMIT PARTS 'TARGETS' 'PREREQUISITES' COMMAND... for a script
# to hand on (examples/slurm). Without -n make would take a step that is only handed on for one that changed nothing.
# $(call run,COMMAND,OUTPUT): in one process
define run
$(if $(SUBMIT),$(SUBMIT) 1 '$@' '$^' )$(1) -o $(2) $(FORCE)
$(if $(SUBMIT),,@touch $@)
endef

# $(call run-shards,COMMAND,BASE,EXTENSION,MANIFEST): with GPUS=n in n parts. Here each has its own GPU and all run at once; a stop of
# make stops them, and it waits until the last has ended. Handed on, %a stands for the number of the part.
run-shards = $(if $(filter 1,$(GPUS)),$(call run,$(1),$(2)$(3)),$(if $(SUBMIT),$(hand-on-shards),$(run-shards-here)))
hand-on-shards = $(SUBMIT) $(GPUS) '$(call shards,$(2),$(3)$(4))' '$^' $(call shard,$(1),%a,$(2),$(3))
define run-shards-here
pids=(); trap 'kill "$${pids[@]}" 2>/dev/null' INT TERM; \
$(foreach i,$(SHARDS),CUDA_VISIBLE_DEVICES=$(call device,$(i)) $(call shard,$(1),$(i),$(2),$(3)) & pids+=($$!); \$(newline))\
code=0; for pid in "$${pids[@]}"; do wait $$pid || code=$$?; done; wait; exit $$code
@touch $(call shards,$(2),$(3)$(4))
endef
define newline


endef
comma := ,
SHARDS := $(shell seq $(GPUS))
DEVICES = $(or $(subst $(comma), ,$(CUDA_VISIBLE_DEVICES)),$(shell seq 0 $(GPUS)))
device = $(or $(word $(1),$(DEVICES)),$(error CUDA_VISIBLE_DEVICES=$(CUDA_VISIBLE_DEVICES) names fewer devices than GPUS=$(GPUS)))
shard = $(1) --shard $(2)/$(GPUS) -o $(3).$(2)-of-$(GPUS)$(4) $(FORCE)
# $(call shards,BASE,EXTENSION): the files of a sharded output
shards = $(if $(filter 1,$(GPUS)),$(1)$(2),$(foreach i,$(SHARDS),$(1).$(i)-of-$(GPUS)$(2)))
# $(call parts,FILES): the parts of a step. The first stands for the step: its oldest part, or one that is missing. (A rule with
# several targets would do, but `make -n` then hides what follows from it.)
parts = $(if $(call missing,$(1)),$(call missing,$(1)) $(wildcard $(1)),$(if $(word 2,$(1)),$(shell ls -tr $(1)),$(1)))
missing = $(firstword $(filter-out $(wildcard $(1)),$(1)))

# -- $(call remember,KIND,NAME): the file RUN/settings/KIND is renewed when the value of NAME, what such a step is asked, has changed
define remember
ifneq ($$(strip $$(file <$(RUN)/settings/$(1))),$$(strip $$($(2))))
.PHONY: $(RUN)/settings/$(1)
endif
$(RUN)/settings/$(1):
	@mkdir -p $$(@D); printf '%s\n' '$$(subst ','\'',$$(strip $$($(2))))' > $$@
endef

# -- names
S := $(RUN)/start
NUMBERS := $(shell seq $(STAGES))
cells = $(foreach arm,$(1),$(foreach seed,$(SEEDS),$(foreach k,$(2),$(RUN)/$(arm)/$(seed)/$(k))))
part = $(word $(2),$(subst /, ,$(patsubst $(RUN)/%,%,$(1))))
before = $(RUN)/$(call part,$(1),1)/$(call part,$(1),2)/$(words $(wordlist 2,$(call part,$(1),3),$(NUMBERS)))
first = $(filter 1,$(call part,$(1),3))
kind = $(call kind-of-arm,$(call part,$(1),1))
own = $(call of-arm,$(1),$(call part,$(2),1))
# $(call policy,CELL): the policy a stage starts from; RUN/start is stage 1 of every arm
policy = $(if $(filter $(S),$(1))$(call first,$(1)),$(MODEL),$(call before,$(1))/policy)
policy-made = $(if $(filter $(S),$(1))$(call first,$(1)),$(MODEL_MADE),$(call before,$(1))/policy/manifest.json)
# the arms that score every stage again, by the policy they have then; those of them that score a part of the pool and predict the rest
RESCORED := $(call arms-of,cropi complete shuffled)
PROBING := $(if $(PROBE),$(call arms-of,cropi))
probing = $(filter $(PROBING),$(call part,$(1),1))
# $(call measured-at,CELL): where a stage's validation means are, and but for arms that probe its scores
measured-at = $(if $(call first,$(1)),$(S),$(1))
# $(call scores,CELL): where the scores a stage selects by are; pass rates are read from the starting policy's rollouts
BY_PASS_RATE := learnability hardest pass-rate
scores = $(strip $(if $(filter full random $(BY_PASS_RATE),$(call kind,$(1))),,$(if $(call probing,$(1)),$(1),$(if $(filter $(RESCORED),$(call part,$(1),1)),$(call measured-at,$(1)),$(S)))))
# the seed of a cell: of its seed and stage, the same for all arms
cell-seed = $(call part,$(1),2)00$(call part,$(1),3)
# that of its selection: shuffled keeps one permutation for all stages, so that its selections overlap as those of cropi do
select-seed = $(if $(filter shuffled,$(call kind,$(1))),$(call part,$(1),2)001,$(cell-seed))
rule = $(if $(filter cropi complete static,$(1)),influence,$(1))

ALL := $(call cells,$(ARMS),$(NUMBERS))
SCORED := $(S) $(call cells,$(filter-out $(PROBING),$(RESCORED)),$(filter-out 1,$(NUMBERS)))
PROBED := $(call cells,$(PROBING),$(NUMBERS))
# where validation means are made: at the start, and for every policy that is scored later
MEANS_AT := $(SCORED) $(foreach cell,$(PROBED),$(if $(call first,$(cell)),,$(cell)))
# $(call rollouts-at,CELL): the folder of the rollouts that a cell's gradients are of
rollouts-at = $(if $(REFRESH),$(1),$(S))
ROLLOUTS = $(call shards,$(1)/train.rollouts,.jsonl)
STORES = $(call shards,$(1)/grads,.zarr)
$(foreach cell,$(SCORED),$(eval STORE_PARTS.$(cell) := $(call parts,$(call shards,$(cell)/grads,.zarr/manifest.json))))
# the parts of the pool that a stage measures where it probes
ASKED := probe $(if $(filter-out 0 0.0,$(SHORTLIST)),shortlist)
$(foreach cell,$(PROBED),$(foreach asked,$(ASKED),$(eval STORE_PARTS.$(cell)/$(asked) := $(call parts,$(call shards,$(cell)/$(asked).grads,.zarr/manifest.json))) \
  $(eval ROLLOUT_PARTS.$(cell)/$(asked) := $(call parts,$(call shards,$(cell)/$(asked).rollouts,.jsonl.manifest.json)))))
SAMPLED := $(if $(REFRESH),$(SCORED),$(S))
$(foreach cell,$(SAMPLED),$(eval ROLLOUT_PARTS.$(cell) := $(call parts,$(call shards,$(cell)/train.rollouts,.jsonl.manifest.json))))
# a stop or a failure removes no target: it is whole as soon as it is there, and without its manifest an output would be refused for good
.PRECIOUS: $(MODEL_MADE) $(RUN)/report.html $(S)/suspects.jsonl.manifest.json $(VALID:%=$(S)/valid-%.rollouts.jsonl.manifest.json) \
  $(foreach cell,$(SAMPLED),$(ROLLOUT_PARTS.$(cell))) \
  $(foreach cell,$(MEANS_AT),$(VALID:%=$(cell)/valid-%.mean.safetensors.manifest.json)) \
  $(foreach cell,$(SCORED),$(STORE_PARTS.$(cell)) $(cell)/scores.jsonl.manifest.json) $(S)/features.safetensors.manifest.json \
  $(foreach cell,$(PROBED),$(addprefix $(cell)/,predicted.jsonl.manifest.json scores.jsonl.manifest.json $(ASKED:%=%.jsonl.manifest.json)) \
    $(foreach asked,$(ASKED),$(STORE_PARTS.$(cell)/$(asked)) $(ROLLOUT_PARTS.$(cell)/$(asked)))) \
  $(foreach cell,$(ALL),$(cell)/selected.jsonl.manifest.json $(cell)/policy/manifest.json)

# with AUDIT the starting policy's gradients are by halves too, and the prompts that pull away from a target are listed
SUSPECTS := $(if $(strip $(AUDIT)),$(S)/suspects.jsonl.manifest.json)

.PHONY: starting-policy curriculum estimate report
starting-policy: $(MODEL_MADE)
curriculum: $(ALL:%=%/policy/manifest.json) $(SUSPECTS)
report: $(RUN)/report.html
	@cropi-report $(RUN) $(REPORT_OPTIONS)
	@echo "page: $(RUN)/report.html   picture: $(RUN)/report.png"

$(RUN)/report.html: $(ALL:%=%/policy/manifest.json) $(SUSPECTS)
	cropi-report $(RUN) $(REPORT_OPTIONS) -o $@ --png $(RUN)/report.png --force --quiet >/dev/null

.SECONDEXPANSION:

# -- once: rollouts of the starting policy
VERIFYING = $(if $(strip $(VERIFIER)),--verifier $(VERIFIER))
SAMPLING = --max-tokens $(MAX_TOKENS) --temperature $(ROLLOUT_TEMPERATURE) $(VERIFYING) $(ROLLOUT_OPTIONS)
ROLLOUT = cropi-rollout --model $(MODEL) $(SAMPLING)
# a run's draw of the starting policy's rollouts: seeds of the pool and of validation
DRAWN := $(shell echo $$((2 * $(DRAW))) $$((2 * $(DRAW) + 1)))
TRAIN_ROLLOUT = $(ROLLOUT) $(POOL) -n $(SAMPLES) --seed $(firstword $(DRAWN))
$(eval $(call remember,train-rollouts,TRAIN_ROLLOUT))
$(firstword $(ROLLOUT_PARTS.$(S))): $(POOL) $(MODEL_MADE) $(RUN)/settings/train-rollouts
	@mkdir -p $(S)
	$(call run-shards,$(TRAIN_ROLLOUT),$(S)/train.rollouts,.jsonl,.manifest.json)

# a run that never had AUDIT need not remember that
AUDITING = $(if $(strip $(AUDIT)),--halves)
AUDITED := $(if $(AUDITING)$(wildcard $(RUN)/settings/audit),$(RUN)/settings/audit)
$(if $(AUDITED),$(eval $(call remember,audit,AUDITING)))
# $(call of-start,CELL,WORDS): the words where the cell is RUN/start
of-start = $(if $(filter $(S),$(1)),$(2))
$(eval $(call remember,means,GRAD_OPTIONS))
define valid-rules
VALID_ROLLOUT.$(1) = $$(ROLLOUT) $$(VALID_FILE.$(1)) -n $$(VALID_SAMPLES) --seed $(lastword $(DRAWN))
$$(eval $$(call remember,valid-rollouts.$(1),VALID_ROLLOUT.$(1)))
$(S)/valid-$(1).rollouts.jsonl.manifest.json: $(VALID_FILE.$(1)) $(MODEL_MADE) $(RUN)/settings/valid-rollouts.$(1)
	@mkdir -p $(S)
	$$(call run,$$(VALID_ROLLOUT.$(1)),$(S)/valid-$(1).rollouts.jsonl)

# with FRESH_VALID the targets are sampled again by every policy that is scored
$(if $(FRESH_VALID),$(filter-out $(S)/%,$(MEANS_AT:%=%/valid-$(1).rollouts.jsonl.manifest.json))): %/valid-$(1).rollouts.jsonl.manifest.json: \
    $(VALID_FILE.$(1)) $$$$(call policy-made,$$$$*) $(RUN)/settings/valid-rollouts.$(1)
	@mkdir -p $$*
	$$(call run,cropi-rollout --model $$(call policy,$$*) $$(SAMPLING) $$(VALID_FILE.$(1)) -n $$(VALID_SAMPLES) --seed $$(call cell-seed,$$*),$$*/valid-$(1).rollouts.jsonl)

$(MEANS_AT:%=%/valid-$(1).mean.safetensors.manifest.json): %/valid-$(1).mean.safetensors.manifest.json: \
    $$$$(call valid-at,$$$$*)/valid-$(1).rollouts.jsonl.manifest.json $$$$(call policy-made,$$$$*) $(RUN)/settings/means $$$$(call of-start,$$$$*,$(AUDITED))
	@mkdir -p $$*
	$$(call run,cropi-grad --model $$(call policy,$$*) $$(call valid-at,$$*)/valid-$(1).rollouts.jsonl --mean $$(GRAD_OPTIONS) $$(call of-start,$$*,$$(AUDITING)),$$*/valid-$(1).mean.safetensors)
endef
# $(call valid-at,CELL): where the rollouts of its validation means are
valid-at = $(if $(FRESH_VALID),$(1),$(S))
$(foreach name,$(VALID),$(eval $(call valid-rules,$(name))))

# -- each stage; with REFRESH, from stage 2 on, first the rollouts of the stage before with some prompts sampled again
$(if $(REFRESH),$(if $(findstring --behavior,$(GRAD_OPTIONS)),$(error REFRESH makes rollouts of several policies, which --behavior in \
  GRAD_OPTIONS cannot recompute; leave one of them out)))
REFRESHING = $(if $(REFRESH),$(SAMPLING) -n $(SAMPLES) $(REFRESH:%=--where %))
# a run that never had REFRESH need not remember that
REFRESHED := $(if $(REFRESH)$(wildcard $(RUN)/settings/refreshing),$(RUN)/settings/refreshing)
$(if $(REFRESHED),$(eval $(call remember,refreshing,REFRESHING)))
scored-before = $(if $(filter 2,$(call part,$(1),3)),$(S),$(call before,$(1)))
told-by = $(if $(filter low-ess% empty zero-gradient,$(REFRESH)),$(patsubst %,--index %,$(call STORES,$(1))))
refreshed = $(patsubst %,--refresh %,$(call ROLLOUTS,$(1))) $(call told-by,$(1))
define refresh-rule
$(firstword $(ROLLOUT_PARTS.$(1))): $(ROLLOUT_PARTS.$(call scored-before,$(1))) \
    $(STORE_PARTS.$(call scored-before,$(1))) $(call policy-made,$(1)) $(REFRESHED)
	@mkdir -p $(1)
	$$(call run-shards,cropi-rollout --model $(call policy,$(1)) $(call refreshed,$(call scored-before,$(1))) $$(REFRESHING),$(1)/train.rollouts,.jsonl,.manifest.json)
endef
$(foreach cell,$(filter-out $(S),$(SAMPLED)),$(eval $(call refresh-rule,$(cell))))

STORE = $(GRAD_OPTIONS) $(STORE_OPTIONS) $(VALID:%=--against %)
against = $(foreach name,$(VALID),--against $(name)=$(1)/valid-$(name).mean.safetensors)
$(eval $(call remember,gradients,STORE))
define grad-rule
$(firstword $(STORE_PARTS.$(1))): $(ROLLOUT_PARTS.$(call rollouts-at,$(1))) \
    $(VALID:%=$(1)/valid-%.mean.safetensors.manifest.json) $(call policy-made,$(1)) $(RUN)/settings/gradients $(if $(filter-out $(S),$(1)),$(REFRESHED),$(AUDITED))
	$$(call run-shards,cropi-grad --model $(call policy,$(1)) $(call ROLLOUTS,$(call rollouts-at,$(1))) $(call against,$(1)) $$(GRAD_OPTIONS) $$(STORE_OPTIONS) $(call of-start,$(1),$(AUDITING)),$(1)/grads,.zarr,/manifest.json)
endef
$(foreach cell,$(SCORED),$(eval $(call grad-rule,$(cell))))

$(SCORED:%=%/scores.jsonl.manifest.json): %/scores.jsonl.manifest.json: $$(STORE_PARTS.$$*)
	$(call run,cropi-score $(call STORES,$*),$*/scores.jsonl)

# -- a stage that probes: a random part of the pool is sampled afresh and scored, the rest predicted from it and from what earlier stages
# measured; the best of the rest are sampled and scored too, and only then is selected
SELECT_PROBE = cropi-select --prompts $(POOL) --by random --per-source --ratio $(PROBE)
SHORTLIST_RATIO = $(shell LC_ALL=C awk 'BEGIN { share = $(SHORTLIST) * $(RATIO); printf "%.10g", (share > 1 ? 1 : share) }')
PROBED_SHARE = $(shell LC_ALL=C awk 'BEGIN { share = $(PROBE) + $(SHORTLIST_RATIO); printf "%.10g", (share > 1 ? 1 : share) }')
SELECT_SHORTLIST = cropi-select --prompts $(POOL) --among predicted --ratio $(SHORTLIST_RATIO)
ASK = cropi-rollout -n $(SAMPLES) $(SAMPLING)
EMBED = cropi-embed --model $(MODEL) $(POOL)
PREDICT = cropi-score --predict $(POOL) --features $(S)/features.safetensors --if-weak warn
$(if $(PROBING),$(foreach pair,probes=SELECT_PROBE shortlists=SELECT_SHORTLIST probe-rollouts=ASK features=EMBED,\
  $(eval $(call remember,$(firstword $(subst =, ,$(pair))),$(lastword $(subst =, ,$(pair)))))))
$(if $(PROBING),$(eval $(call remember,probed-gradients,STORE)))

$(S)/features.safetensors.manifest.json: $(POOL) $(MODEL_MADE) $(if $(PROBING),$(RUN)/settings/features)
	@mkdir -p $(S)
	$(call run,$(EMBED),$(S)/features.safetensors)

# $(call scored-stages,CELL): the cells of earlier stages, the newest first
scored-stages = $(if $(call first,$(1)),,$(call before,$(1)) $(call scored-stages,$(call before,$(1))))
old = $(foreach cell,$(call scored-stages,$(1)),--old $(cell)/scores.jsonl)
$(PROBED:%=%/probe.jsonl.manifest.json): %/probe.jsonl.manifest.json: $(POOL) $(RUN)/settings/probes
	@mkdir -p $*
	$(call run,$(SELECT_PROBE) --seed $(call cell-seed,$*),$*/probe.jsonl)

# $(call asked-rules,CELL,PART): rollouts and gradients of a part
define asked-rules
$(firstword $(ROLLOUT_PARTS.$(1)/$(2))): $(1)/$(2).jsonl.manifest.json $(call policy-made,$(1)) $(RUN)/settings/probe-rollouts
	$$(call run-shards,cropi-rollout --model $(call policy,$(1)) $(1)/$(2).jsonl -n $$(SAMPLES) $$(SAMPLING) --seed $(call cell-seed,$(1)),$(1)/$(2).rollouts,.jsonl,.manifest.json)

$(firstword $(STORE_PARTS.$(1)/$(2))): $(ROLLOUT_PARTS.$(1)/$(2)) $(RUN)/settings/probed-gradients \
    $(VALID:%=$(call measured-at,$(1))/valid-%.mean.safetensors.manifest.json) $(call policy-made,$(1))
	$$(call run-shards,cropi-grad --model $(call policy,$(1)) $(call shards,$(1)/$(2).rollouts,.jsonl) $(call against,$(call measured-at,$(1))) $$(GRAD_OPTIONS) $$(STORE_OPTIONS),$(1)/$(2).grads,.zarr,/manifest.json)
endef
$(foreach cell,$(PROBED),$(foreach asked,$(ASKED),$(eval $(call asked-rules,$(cell),$(asked)))))

before-scores = $(foreach cell,$(call scored-stages,$(1)),$(cell)/scores.jsonl.manifest.json)
$(PROBED:%=%/predicted.jsonl.manifest.json): %/predicted.jsonl.manifest.json: \
    $$(STORE_PARTS.$$*/probe) $(S)/features.safetensors.manifest.json $$(call before-scores,$$*)
	$(call run,$(PREDICT) $(call shards,$*/probe.grads,.zarr) $(call old,$*),$*/predicted.jsonl)

$(PROBED:%=%/shortlist.jsonl.manifest.json): %/shortlist.jsonl.manifest.json: %/predicted.jsonl.manifest.json $(RUN)/settings/shortlists
	$(call run,$(SELECT_SHORTLIST) $*/predicted.jsonl --seed $(call cell-seed,$*),$*/shortlist.jsonl)

$(PROBED:%=%/scores.jsonl.manifest.json): %/scores.jsonl.manifest.json: \
    $$(foreach asked,$(ASKED),$$(STORE_PARTS.$$*/$$(asked))) $(S)/features.safetensors.manifest.json $$(call before-scores,$$*)
	$(call run,$(PREDICT) $(foreach asked,$(ASKED),$(call shards,$*/$(asked).grads,.zarr)) $(call old,$*),$*/scores.jsonl)

# without a shortlist, what was predicted is selected too
among = $(if $(call probing,$(1)),$(if $(filter shortlist,$(ASKED)),,--among all))
$(S)/suspects.jsonl.manifest.json: $(STORE_PARTS.$(S)) $(ROLLOUT_PARTS.$(S))
	$(call run,cropi-score $(call STORES,$(S)) $(patsubst %,--suspects %,$(call ROLLOUTS,$(S))),$(S)/suspects.jsonl)

# $(call remember-own,KIND,NAMES): the arms that have values of these names of their own, or had some, remember them each
remember-own = $(strip $(foreach arm,$(ARMS),$(if $(strip $(foreach name,$(2),$(call of-arm,$(name),$(arm)))$(wildcard $(RUN)/settings/$(1).$(arm))),$(eval \
  OWN_$(1).$(arm) = $$(foreach name,$(2),$$(name)=$$(call of-arm,$$(name),$(arm))))$(eval $(call remember,$(1).$(arm),OWN_$(1).$(arm)))$(arm))))
own-settings = $(if $(filter $(call part,$(3),1),$(2)),$(RUN)/settings/$(1).$(call part,$(3),1))
SELECTING_OWN := $(call remember-own,selections,RULE POOL SELECT_OPTIONS)
TRAINING_OWN := $(call remember-own,training,TRAIN_OPTIONS)

SELECT = cropi-select --prompts $(POOL) --ratio $(RATIO)
$(eval $(call remember,selections,SELECT))
pool = $(or $(call own,POOL,$(1)),$(POOL))
select = cropi-select --prompts $(call pool,$(1)) $(or $(call own,SELECT_OPTIONS,$(1)),--ratio $(RATIO))
rated = $(if $(filter $(BY_PASS_RATE),$(call kind,$(1))),$(2))
$(ALL:%=%/selected.jsonl.manifest.json): %/selected.jsonl.manifest.json: $$(call pool,$$*) \
    $$(addsuffix /scores.jsonl.manifest.json,$$(call scores,$$*)) $$(call rated,$$*,$(ROLLOUT_PARTS.$(S))) $(RUN)/settings/selections $$(call own-settings,selections,$(SELECTING_OWN),$$*)
	@mkdir -p $*
	$(call run,$(call select,$*) $(addsuffix /scores.jsonl,$(call scores,$*)) $(call rated,$*,$(patsubst %,--rollouts %,$(call ROLLOUTS,$(S)))) --by $(call rule,$(call kind,$*)) $(call among,$*) --seed $(call select-seed,$*),$*/selected.jsonl)

# the optimizer's state takes twice the disk of a policy: it is kept only where something will read it
STATELESS := $(if $(filter full,$(CARRY))$(filter --preconditioner% --state% --carry%,$(GRAD_OPTIONS) $(STORE_OPTIONS) $(TRAIN_OPTIONS)),,--state drop)
TRAIN = cropi-train --steps $(STEPS) -n $(SAMPLES) --max-tokens $(MAX_TOKENS) $(VERIFYING) \
  $(foreach name,$(TEST),--eval $(name)=$(TEST_FILE.$(name))) $(STATELESS) $(TRAIN_OPTIONS)
# what is carried is told from stage 2 on; a run that carries weights need not remember that
TRAINED = $(TRAIN)$(if $(filter full,$(CARRY)), --carry full)
carried = $(if $(call first,$(1)),,$(if $(filter full,$(CARRY)),--carry full))
$(eval $(call remember,training,TRAINED))
$(ALL:%=%/policy/manifest.json): %/policy/manifest.json: \
    %/selected.jsonl.manifest.json $(foreach name,$(TEST),$(TEST_FILE.$(name))) $$(call policy-made,$$*) $(RUN)/settings/training \
    $$(call own-settings,training,$(TRAINING_OWN),$$*)
	$(call run,$(TRAIN) $(call carried,$*) $(call own,TRAIN_OPTIONS,$*) --model $(call policy,$*) $*/selected.jsonl --seed $(call cell-seed,$*),$*/policy)

# -- what all of it will take, from a few prompts that go through every command in a temporary folder
quoted = '$(subst ','\'',$(strip $(1)))'
estimate: $(POOL) $(MODEL_MADE) $(foreach name,$(VALID),$(VALID_FILE.$(name))) $(foreach name,$(TEST),$(TEST_FILE.$(name)))
	@python $(HERE)examples/estimate.py --pool $(POOL) --samples $(SAMPLES) --valid-samples $(VALID_SAMPLES) \
	  $(foreach name,$(VALID),--valid $(name)=$(VALID_FILE.$(name))) --rollout $(call quoted,$(ROLLOUT)) \
	  --grad $(call quoted,cropi-grad --model $(MODEL) $(GRAD_OPTIONS)) --store=$(call quoted,$(STORE_OPTIONS)) \
	  --train $(call quoted,$(TRAIN) --model $(MODEL)) --arms $(call quoted,$(foreach arm,$(ARMS),$(call kind-of-arm,$(arm)))) --refresh $(call quoted,$(REFRESH)) $(if $(PROBING),--probe $(PROBED_SHARE)) \
	  --stages $(STAGES) --seeds $(words $(SEEDS)) --gpus $(GPUS)
