# Bed (c), worked answers: a policy of 6.6 million parameters that works its answers out in 20 to 80 tokens, so that sampling and training cost
# something: the bed for seconds. Every seed has a draw of rollouts and a run of its own; the starting policy is one.

SEED ?= 1
PLACE := runs/reproduce/worked-tasks
DATA := $(PLACE)/data
TASKS := benchmarks/reproduce/worked_tasks.py
TARGETS := add mod
OTHERS := mul gcd dig sum rev ord max pol

# a prompt in twenty is of a target
$(DATA)/pool.jsonl: $(TASKS)
	@mkdir -p $(DATA)
	python $(TASKS) --only $(TARGETS) --size 13 --seed 1 -o $@.targets
	python $(TASKS) --only $(OTHERS) --size 60 --seed 1 -o $@.others
	cat $@.targets $@.others > $@

$(DATA)/valid.%.jsonl: $(DATA)/pool.jsonl
	python $(TASKS) --only $* --size 12 --seed 2 --exclude $^ -o $@

$(DATA)/test.%.jsonl: $(DATA)/pool.jsonl $(DATA)/valid.%.jsonl
	python $(TASKS) --only $* --size 40 --seed 3 --exclude $^ -o $@

$(DATA)/test.others.jsonl: $(DATA)/pool.jsonl
	python $(TASKS) --only $(OTHERS) --size 3 --seed 3 --exclude $^ -o $@

SETS := $(DATA)/pool.jsonl $(TARGETS:%=$(DATA)/valid.%.jsonl) $(TARGETS:%=$(DATA)/test.%.jsonl) $(DATA)/test.others.jsonl
$(DATA)/warmup.jsonl: $(SETS)
	python $(TASKS) --size 2000 --seed 4 --exclude $^ -o $@

$(PLACE)/P0/manifest.json: $(DATA)/warmup.jsonl benchmarks/reproduce/worked_warmup.py
	python benchmarks/reproduce/worked_warmup.py $< -o $(@D) $(FORCE)
	@touch $@

RUN := runs/reproduce/worked/$(SEED)
MODEL := $(PLACE)/P0
MODEL_MADE := $(PLACE)/P0/manifest.json
POOL := $(DATA)/pool.jsonl
VALID := $(TARGETS)
TEST := $(TARGETS) others
VALID_FILE.mod := $(DATA)/valid.mod.jsonl
VALID_FILE.add := $(DATA)/valid.add.jsonl
TEST_FILE.mod := $(DATA)/test.mod.jsonl
TEST_FILE.add := $(DATA)/test.add.jsonl
TEST_FILE.others := $(DATA)/test.others.jsonl

STAGES ?= 2
STEPS ?= 30
SEEDS := $(SEED)
DRAW := $(SEED)
PROBE := 0.1
SHORTLIST := 0
SAMPLES := 8
VALID_SAMPLES := 8
MAX_TOKENS := 88
VERIFIER := maths
STORE_OPTIONS := --dim 4096
TRAIN_OPTIONS := --batch 16 --learning-rate 3e-5 --warmup 5 --betas 0.9,0.99 --eval-every 5 --eval-samples 1 --eval-temperature 1.0

ARMS ?= full cropi random
