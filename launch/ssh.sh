#!/bin/bash
# A run on machines that ssh reaches: some train, others sample.
#
#     launch/ssh.sh FILE.toml RUN_NAME "TRAINER ..." "SERVER ..." [section.key=value ...]
#
# Run from the repository, which must be at the same path on all machines, as must the run's folder
# (runs/RUN_NAME, or ROOT/RUN_NAME) on a file system that all of them see. PYTHON names the
# interpreter there. Interrupting this script ends both halves; `touch runs/RUN_NAME/stop` ends the
# run after its step, with a checkpoint. Started again, it goes on.
set -euo pipefail

config=$1 name=$2
read -ra trainers <<< "$3"
read -ra servers <<< "$4"
shift 4
root=${ROOT:-runs}
run=$root/$name
gpus=${GPUS_PER_NODE:-8}
python=${PYTHON:-python}
head=${HEAD_ADDRESS:-${trainers[0]}}
width=$("$python" -c 'import sys
from ovr_fast.config import load_config
print(load_config(sys.argv[1], sys.argv[2:]).rollout.tensor)' "$config" "$@")
settings=("run.root=$root" "run.name=$name" rollout.servers=0 'rollout.urls=[]'
    "rollout.expect=$((${#servers[@]} * gpus / width))" "rollout.transfer_address=$head" "$@")

start=(--config "$config")
if compgen -G "$run/checkpoints/*-??????" > /dev/null; then
    start=(--resume "$run")
elif [[ -e $run/metrics.jsonl ]]; then # it ended before its first checkpoint
    mv "$run" "$run.$(date +%Y%m%d-%H%M%S)"
fi
rm -f "$run/stop"
rm -rf "$root/$name.servers" # of a run that was killed

# -tt: the remote command ends with this script.
there() {
    local host=$1
    shift
    ssh -tt -o BatchMode=yes "$host" "cd $(printf %q "$PWD") && $(printf '%q ' "$@")"
}

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
for host in "${servers[@]}"; do
    there "$host" "$python" -m ovr_fast.rollout.serve --register --host "$host" \
        --config "$config" "${settings[@]}" < /dev/null &
done
training=()
for host in "${trainers[@]}"; do
    there "$host" "$python" -m torch.distributed.run --nnodes="${#trainers[@]}" \
        --nproc-per-node="$gpus" --rdzv-id="$name" --rdzv-backend=c10d \
        --rdzv-endpoint="${trainers[0]}:29500" \
        -m ovr_fast.train "${start[@]}" "${settings[@]}" < /dev/null &
    training+=($!)
done
status=0
for job in "${training[@]}"; do
    wait "$job" || status=$?
done
exit "$status"
