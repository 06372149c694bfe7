#!/bin/bash
# A run on Slurm: the first nodes train, the others sample.
#
#     sbatch --nodes=8 launch/slurm.sh FILE.toml RUN_NAME TRAINER_NODES [section.key=value ...]
#
# Fifteen minutes before the time limit the step ends with a checkpoint, the job goes back into the
# queue, and the next one goes on from there (sbatch --signal=B:USR1@3600 for longer steps). The run's
# folder (runs/RUN_NAME, or ROOT/RUN_NAME)
# must be on a file system that all nodes see.
#SBATCH --job-name=ovr_fast
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=$1 name=$2 trainers=$3
shift 3
root=${ROOT:-runs}
run=$root/$name
gpus=${GPUS_PER_NODE:-8}
python=${PYTHON:-python}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
servers=$((${#nodes[@]} - trainers))
if ((trainers < 1 || servers < 1)); then
    echo "slurm.sh: $trainers of ${#nodes[@]} nodes train, which leaves $servers to sample" >&2
    exit 2
fi
trainer_nodes=$(IFS=,; echo "${nodes[*]:0:trainers}")
server_nodes=$(IFS=,; echo "${nodes[*]:trainers}")
head=${HEAD_ADDRESS:-$(getent hosts "${nodes[0]}" | awk '{print $1; exit}')}
width=$("$python" -c 'import sys
from ovr_fast.config import load_config
print(load_config(sys.argv[1], sys.argv[2:]).rollout.tensor)' "$config" "$@")
settings=("run.root=$root" "run.name=$name" rollout.servers=0 'rollout.urls=[]'
    "rollout.expect=$((servers * gpus / width))" "rollout.transfer_address=$head" "$@")

start=(--config "$config")
if compgen -G "$run/checkpoints/*-??????" > /dev/null; then
    start=(--resume "$run")
elif [[ -e $run/metrics.jsonl ]]; then # it ended before its first checkpoint
    mv "$run" "$run.$(date +%Y%m%d-%H%M%S)"
fi
rm -f "$run/stop"
rm -rf "$root/$name.servers" # of a job that was killed

# One server a GPU (or rollout.tensor of them), with the options that this run needs.
srun --nodes="$servers" --ntasks="$servers" --nodelist="$server_nodes" bash -c '
    exec "$0" -m ovr_fast.rollout.serve --register --host "$(hostname -i | cut -d" " -f1)" "$@"
' "$python" --config "$config" "${settings[@]}" &
serving=$!

srun --nodes="$trainers" --ntasks="$trainers" --nodelist="$trainer_nodes" \
    "$python" -m torch.distributed.run --nnodes="$trainers" --nproc-per-node="$gpus" --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \
    -m ovr_fast.train "${start[@]}" "${settings[@]}" &
training=$!

stopping=no
trap 'stopping=yes; mkdir -p "$run"; touch "$run/stop"' USR1
status=0
while kill -0 "$training" 2> /dev/null; do
    status=0
    wait "$training" || status=$? # a trapped signal ends the waiting too
done
kill "$serving" 2> /dev/null || true
wait "$serving" || true
if [[ $stopping == yes && $status == 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
