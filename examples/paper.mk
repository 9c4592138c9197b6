# The setting of arXiv 2510.26491, as the recipes of its models share it. paper.md beside this file says how to run them. Not run yet.
#
# Where a value is from:
#   (paper)             the paper has it
#   (released script)   the paper does not say; the authors' release has it (thu-coai/CROPI, March 2026)
#   not published; ours neither says, or they do not settle it: a choice of this recipe
#
# A recipe sets RUN, MODEL, PARAMETERS, MAX_TOKENS, FORM, STAGES, STEPS, ARMS and SEEDS before it includes this file, and where it differs REFERENCE, EVALUATION and
# TRAIN_ENGINE.

DATA ?= $(RUN)/data
POOL := $(DATA)/pool.jsonl

# Targets (paper); at most 100 validation prompts each (paper). Which 100: not published; ours are drawn from the training sets, and the pool is
# without them.
PAPER_VALID := gsm8k math
VALID := $(PAPER_VALID)
VALID_SIZE := 100
VALID_FILE.gsm8k := $(DATA)/valid.gsm8k.jsonl
VALID_FILE.math := $(DATA)/valid.math.jsonl
# Tests: the targets, and four untargeted sets (paper). Which questions of each: not published; ours are the sets named below.
PAPER_TEST := gsm8k math gaokao2023en amc23 olympiadbench aime24
TEST := $(PAPER_TEST)
TEST_FILE.gsm8k := $(DATA)/test.gsm8k.jsonl
TEST_FILE.math := $(DATA)/test.math.jsonl
TEST_FILE.gaokao2023en := $(DATA)/test.gaokao2023en.jsonl
TEST_FILE.amc23 := $(DATA)/test.amc23.jsonl
TEST_FILE.olympiadbench := $(DATA)/test.olympiadbench.jsonl
TEST_FILE.aime24 := $(DATA)/test.aime24.jsonl

# Share that a stage selects, responses of a pool prompt and of a validation prompt, temperature of these rollouts: (paper). They are the starting
# policy's, for all stages (paper).
RATIO := 0.1
SAMPLES := 8
VALID_SAMPLES := 32
ROLLOUT_TEMPERATURE := 0.5
# How answers are read: not published; ours
VERIFIER := maths
# vLLM (released script; pip install 'cropi-tools[vllm]'). ENGINE=transformers does without.
ENGINE ?= vllm
ROLLOUT_OPTIONS := --engine $(ENGINE)

# Behavior probabilities recomputed with the starting policy, token ratio, no clip (paper). In bfloat16, as the behavior policy is stored, at every stage
# (released script); activations computed again (released script): less memory, the same gradient.
GRAD_OPTIONS := --behavior $(MODEL) --weighting token --dtype bfloat16 --checkpoint-activations
# 32768 dimensions (paper). The paper keeps 15M coordinates (1 % of 1.5B) and projects them with a Gaussian. Ours sketches all coordinates, and scores do not use the
# sketch: they are exact. STORE_OPTIONS='--sketch sparse-gaussian --keep 0.01 --dim 32768' makes the paper's.
STORE_OPTIONS := --sketch countsketch --dim 32768

# GRPO, by --preset paper: 128 prompts x 8 at temperature 1, rate 1e-6, k3 KL .001, entropy bonus .001, clip .2 (paper); token mean, constant rate, gradient norm 1,
# weight decay .01, one update a batch: verl's defaults, which the released script leaves as they are.
# Reference of the KL term: not settled by the release, whose two training scripts differ; ours is REFERENCE, the starting policy unless said otherwise.
# Evaluation every 20 steps: not published; ours (released script: 10). How it samples (EVALUATION) and how often to save: not published; ours.
REFERENCE ?= start
EVALUATION ?= --eval-samples 1 --eval-temperature 0
TRAIN_ENGINE ?= --engine $(ENGINE)
TRAIN_OPTIONS := --preset paper --reference $(REFERENCE) --eval-every 20 $(EVALUATION) --save-every 10 --checkpoint-activations $(TRAIN_ENGINE)

# -- data by name. Pool: GSM8K + MATH + DeepScaleR (paper), the training sets of the first two (released script); sizes not published.
PAPER_POOL := gsm8k math deepscaler
HUB.gsm8k := hf:openai/gsm8k:main --split train
MAP.gsm8k := prompt=question,answer=answer
HUB.math := hf:DigitalLearningGmbH/MATH-lighteval --split train
MAP.math := prompt=problem,answer=solution
HUB.deepscaler := hf:agentica-org/DeepScaleR-Preview-Dataset --split train
MAP.deepscaler := prompt=problem,answer=answer
HUB.test.gsm8k := hf:openai/gsm8k:main --split test
MAP.test.gsm8k := prompt=question,answer=answer
HUB.test.math := hf:HuggingFaceH4/MATH-500 --split test
MAP.test.math := prompt=problem,answer=answer
HUB.test.gaokao2023en := hf:MARIO-Math-Reasoning/Gaokao2023-Math-En --split train
MAP.test.gaokao2023en := prompt=question,answer=answer
HUB.test.amc23 := hf:math-ai/amc23 --split test
MAP.test.amc23 := prompt=question,answer=answer
HUB.test.olympiadbench := hf:Hothan/OlympiadBench:OE_TO_maths_en_COMP --split train
MAP.test.olympiadbench := prompt=question,answer=final_answer
HUB.test.aime24 := hf:HuggingFaceH4/aime_2024 --split train
MAP.test.aime24 := prompt=problem,answer=answer

# Test questions first; validation without them; the pool without both. Files of your own count. With a shorter VALID or TEST the pool stays the same.
own-files = $(foreach name,$(filter-out $(1),$($(2))),$(if $(value $(2)_FILE.$(name)),$($(2)_FILE.$(name))))
TESTS_APART := $(foreach name,$(PAPER_TEST),$(TEST_FILE.$(name))) $(call own-files,$(PAPER_TEST),TEST)
BOTH_APART := $(TESTS_APART) $(foreach name,$(PAPER_VALID),$(VALID_FILE.$(name))) $(call own-files,$(PAPER_VALID),VALID)
# $(call prompts-of,SET,SOURCE): the set's prompts, with ids that begin with SOURCE
prompts-of = cropi-prompts $(HUB.$(1)) --map $(MAP.$(1)) --source $(2) $(FORM)
left-out = $(1:%=--exclude %)

$(PAPER_TEST:%=$(DATA)/test.%.jsonl): $(DATA)/test.%.jsonl:
	@mkdir -p $(DATA)
	$(call prompts-of,test.$*,$*-test) -o $@ $(FORCE)
	@touch $@

$(PAPER_VALID:%=$(DATA)/valid.%.jsonl): $(DATA)/valid.%.jsonl: $(TESTS_APART)
	@mkdir -p $(DATA)
	$(call prompts-of,$*,$*-valid) --size $(VALID_SIZE) --seed 1 $(call left-out,$^) -o $@ $(FORCE)
	@touch $@

$(PAPER_POOL:%=$(DATA)/pool.%.jsonl): $(DATA)/pool.%.jsonl: $(BOTH_APART)
	@mkdir -p $(DATA)
	$(call prompts-of,$*,$*) $(call left-out,$^) -o $@ $(FORCE)
	@touch $@

# a question of several sets stays where it comes first
$(DATA)/pool.jsonl: $(PAPER_POOL:%=$(DATA)/pool.%.jsonl)
	cropi-prompts $^ -o $@ $(FORCE)
	@touch $@
