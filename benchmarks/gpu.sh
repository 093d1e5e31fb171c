#!/bin/sh
# All that is to be known of a machine with a CUDA device, in at most nine minutes:
#
#     sh benchmarks/gpu.sh DATA OUTPUT
#
# DATA holds mvtec_ad/toothbrush; OUTPUT gets a file a part. Each part has its own time
# limit, and what it had printed by then is kept. On a processor, tiny settings try the
# script itself: DEVICE=cpu sh benchmarks/gpu.sh DATA OUTPUT
data=${1:?DATA} output=${2:?OUTPUT} device=${DEVICE:-cuda} here=$(dirname "$0")
started=$(date +%s)
mkdir -p "$output"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"

part() { # NAME SECONDS COMMAND...
    name=$1 limit=$2
    shift 2
    printf '\n== %s (at %s s, at most %s s)\n' \
        "$name" $(($(date +%s) - started)) "$limit"
    timeout -k 5 "$limit" "$@" >"$output/$name.txt" 2>&1
    status=$?
    tail -n 60 "$output/$name.txt"
    echo "exit status $status" | tee -a "$output/$name.txt"
}

speed() { # NAME SECONDS ARGUMENTS...
    name=$1 limit=$2
    shift 2
    part "$name" "$limit" python "$here/speed.py" --table methods \
        --device "$device" --output "$output/$name.json" "$@"
}

part machine 20 python -c "import torch
print(torch.__version__, torch.version.cuda)
print(*[torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())])"
if [ "$device" = cpu ]; then
    part devices 60 python "$here/devices.py" --device cpu --size 32 \
        --methods DRAEM MemAE
    speed small 60 --sizes 32 --methods DRAEM --seconds 0.2 \
        --precisions float32 tf32 bfloat16
    budget=0.05
    params="draem.reconstructive_width=4 draem.discriminative_width=4 riad.width=4
        intra.width=16 intra.n_blocks=1 intra.n_heads=2 intra.patch_size=8
        intra.window_size=3"
    set -- --params $params --size 32
else
    part devices 100 python "$here/devices.py" --device "$device"
    if python -c "import pytest" 2>/dev/null; then
        # device="auto", the default, is the GPU
        part tests 80 python -m pytest -q -p no:cacheprovider --maxfail=20 \
            -k "not check_estimator" "$here/../tests/test_common.py"
    else
        echo "pytest is not installed: tests/test_common.py is left out"
    fi
    speed paper 130 --paper --sizes 256 --seconds 1 \
        --methods DRAEM RIAD MNAD MemAE InTra --precisions float32 tf32 bfloat16
    budget=0
    set -- --size 256
fi
# what is left is shared by three trainings; tests and figures take a tenth of it
left=$((530 - ($(date +%s) - started)))
[ "$budget" = 0 ] && budget=$(echo "$left" | awk '{print 0.8 * $1 / 3 / 60}')
part training "$left" python "$here/accuracy.py" --data "$data" \
    --sets mvtec_ad/toothbrush --methods draem riad intra --seeds 0 \
    --budget "$budget" --output "$output" "$@"
printf '\nall in %s s\n' $(($(date +%s) - started))
