#!/bin/sh
# Everything that only a GPU tells, in the order of its worth, each part within its own limit:
#
#   benchmarks/on_gpu.sh FOLDER [PART ...]      correct kernels whole step profile (14 minutes)
#                                               toy, peers (12 minutes; TRL where it is installed),
#                                               sanitize (4 minutes), specialised (5, last)
#
# FOLDER gets a log of each part while it runs, and its JSON file, also of a part that is cut off.
out=${1:?"usage: benchmarks/on_gpu.sh FOLDER [PART ...]"}
shift
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" OVR_KERNELS_GPU=1
failed=0

part() { # NAME SECONDS COMMAND...
    name=$1 limit=$2
    shift 2
    began=$(date +%s)
    if timeout -k 10 "$limit" "$@" > "$out/$name.log" 2>&1; then verdict=done; else verdict="FAILED ($?)" failed=1; fi
    echo "$name: $verdict in $(($(date +%s) - began)) s"
    tail -n 25 "$out/$name.log" | cut -c 1-160
}

for word in ${*:-correct kernels whole step profile}; do
    case $word in
    correct) part correct 150 python3 -m pytest -q -p no:cacheprovider -n 4 tests/gpu/test_kernels_on_gpu.py tests/gpu/test_attention_on_gpu.py -k "not specialised" ;;
    specialised)  # last: a kernel that no card has run may end in any way
        part compare 150 python3 -m pytest -q -p no:cacheprovider -n 4 tests/gpu/test_kernels_on_gpu.py -k specialised
        part tiles 150 python3 benchmarks/head_tiles.py --json "$out/tiles.json"
        ;;
    toy) part toy 150 python3 -m pytest -q -p no:cacheprovider tests/gpu/test_runs_on_gpu.py ;;
    kernels) part kernels 180 python3 benchmarks/report.py --json "$out/kernels.json" ;;
    whole) part whole 280 python3 benchmarks/gpu_run.py --limit 230 --output "$out/run.json" --log "$out/run.log" ;;
    step) part step 100 python3 benchmarks/gpu_step.py --only "1 rank, selective" --output "$out/step.json" ;;
    peers)
        part peers 300 python3 benchmarks/step.py --steps 2 --turns 1 --output "$out/peers.json"
        python3 -c "import trl" 2> /dev/null || { echo "trl: not installed" && continue; }
        part trl 300 python3 benchmarks/trl_step.py --steps 2 --turns 1 --output "$out/trl.json"
        ;;
    profile)
        rm -f "$out/1-rank-selective.json.gz"
        part profile 100 python3 benchmarks/gpu_step.py --only "1 rank, selective" --profile 3:3 --traces "$out"
        part words 20 python3 benchmarks/read_trace.py "$out/1-rank-selective.json.gz"
        ;;
    sanitize)
        for tool in memcheck racecheck; do
            part "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                python3 -m pytest -q -p no:cacheprovider tests/gpu/test_kernels_on_gpu.py -k small
        done
        ;;
    *) echo "no part $word: correct toy kernels whole step peers profile sanitize specialised" && exit 2 ;;
    esac
done
exit $failed
