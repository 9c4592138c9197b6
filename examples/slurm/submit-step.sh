#!/bin/bash
# Submits one step and prints its job's number. submit.sh calls it as PARTS 'TARGETS' 'PREREQUISITES' COMMAND...; $JOBS is a file of
# lines TARGET JOB of what is submitted so far.
set -eu
parts=$1 targets=$2 prerequisites=$3
shift 3

declare -A job_of=() seen=()
while read -r target job; do job_of[$target]=$job; done < "$JOBS"
after=
for prerequisite in $prerequisites; do
    job=${job_of[$prerequisite]:-}
    if [ -n "$job" ] && [ -z "${seen[$job]:-}" ]; then
        seen[$job]=yes
        after+=:$job
    fi
done

case $1 in
    cropi-score | cropi-select) resources=$CPU_JOB ;;
    cropi-train) resources=$TRAIN_JOB ;;
    *) resources=$GPU_JOB ;;
esac
options=(--parsable "--job-name=$1:$RUN_FOLDER" "--output=$RUN_FOLDER/slurm/%j-$1.out")
[ "$parts" -eq 1 ] || options+=("--array=1-$parts" "--output=$RUN_FOLDER/slurm/%A_%a-$1.out")
[ -z "$after" ] || options+=("--dependency=afterok$after" --kill-on-invalid-dep=yes)

mkdir -p "$RUN_FOLDER/slurm"
# shellcheck disable=SC2086  # the resources are several words
job=$(sbatch "${options[@]}" $resources examples/slurm/step.sbatch "$@")
job=${job%%;*}
for target in $targets; do echo "$target $job" >> "$JOBS"; done
echo "$job $*"
