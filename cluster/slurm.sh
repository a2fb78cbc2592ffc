#!/usr/bin/env bash
# One run on a SLURM cluster:  sbatch --nodes=2 cluster/slurm.sh python -m mowe_ray.train --config paper name=mowe ...
# What follows the script's name runs on the first node and joins the Ray cluster of all of them. The environment, the
# checkout, `storage` and the shards are on file systems that all nodes see.
#
#   before the time limit   it saves a checkpoint, goes back into the queue, and resumes
#   scancel --batch --signal=INT JOB    it saves a checkpoint and ends
#SBATCH --job-name=mowe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
# Whole nodes: at the end, Ray stops whatever Ray it finds on a node.
#SBATCH --exclusive
set -euo pipefail

[ "$#" -gt 0 ] || { echo "usage: sbatch cluster/slurm.sh COMMAND ..." >&2; exit 2; }

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses | awk '{print $1}'):6379

# Other users reach these ports too, and Ray runs what it is sent: only processes of this job know the token.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # Ray's own 30 s are short for a cold file system

# The command leaves its process id on the head: a signal is for it alone, and SLURM's would reach all of Ray as well.
pid_file=/tmp/mowe-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.pid
run() {
    # The exit code is the command's: the other nodes end with 0 when the head is gone, and nobody kills them before.
    exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        --kill-on-bad-exit=0 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats -- \
        env RAY_ADDRESS="$address" bash -c 'echo $$ > "$0" && exec "$@"' "$pid_file" "$@"
}
save_and_end() {
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" bash -c 'kill -TERM "$(cat "$0")"' "$pid_file" ||
        kill -TERM "$steps" # it has not started yet
}
requeue=false
trap 'requeue=true; save_and_end' TERM
trap save_and_end INT

run "$@" &
steps=$!
# A signal ends `wait` at once, and the run much later.
until wait "$steps"; code=$?; ! kill -0 "$steps" 2>/dev/null; do :; done
if $requeue && [ "$code" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
