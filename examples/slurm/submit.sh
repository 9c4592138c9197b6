#!/bin/bash
# Submits what is left of a curriculum: a job for every step, an array of GPUS tasks for rollouts and gradients, each waiting for the
# jobs it builds on (afterok).
#
#   examples/slurm/submit.sh CONFIG GPUS [what make understands]
#   examples/slurm/submit.sh examples/qwen2.5-1.5b-math/config.mk 8 STAGES=2
#   examples/slurm/submit.sh examples/qwen2.5-1.5b-math/config.mk 8 -n            only shows the steps
set -eu

# -- edit: what a job asks for. Rollouts and gradients have a GPU each; training has as many, unless told otherwise; scoring and selecting need none.
export GPU_JOB=${GPU_JOB:---gpus=1 --cpus-per-task=8 --mem=64G --time=12:00:00}
export TRAIN_JOB=${TRAIN_JOB:-$GPU_JOB}
export CPU_JOB=${CPU_JOB:---cpus-per-task=2 --mem=16G --time=00:30:00}

[ $# -ge 2 ] || { echo "usage: submit.sh CONFIG GPUS [STAGES=n] [FORCE=--force] [-n]" >&2; exit 2; }
config=$(realpath "$1") gpus=$2
shift 2
cd "$(dirname "$0")/../.."
make=(make --no-print-directory --silent "CONFIG=$config" "GPUS=$gpus" "$@")

# what is left, in order: `make -n` shows every step as a call of submit-step.sh
plan=$("${make[@]}" -n SUBMIT=examples/slurm/submit-step.sh curriculum)
case " $* " in *" -n "*) echo "$plan"; exit ;; esac

{ read -r RUN_FOLDER && read -r PATH; } < <("${make[@]}" --eval='names: ; $(info $(RUN))$(info $(PATH))' names)
# two jobs for one file would be in each other's way
waiting=$(squeue --me --noheader --format=%j | sed 's/^[^:]*://' | grep -cxF "$RUN_FOLDER" || true)
if [ "$waiting" -gt 0 ]; then
    echo "submit.sh: $waiting jobs of $RUN_FOLDER are in the queue (squeue --me); wait for them or scancel them, then submit again" >&2
    exit 1
fi

JOBS=$(mktemp)
trap 'rm -f "$JOBS"' EXIT
export JOBS RUN_FOLDER PATH
if ! bash -eu -o pipefail -c "$plan"; then
    echo "submit.sh: stopped in the middle; what was submitted stays in the queue (squeue --me, scancel)" >&2
    exit 1
fi
echo "submitted: $(cut -d ' ' -f 2 "$JOBS" | sort -u | wc -l) jobs; their output goes to $RUN_FOLDER/slurm/" >&2
