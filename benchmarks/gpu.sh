#!/bin/sh
# All that is to be known of a machine with a CUDA device, in at most nine minutes:
#
#     sh benchmarks/gpu.sh DATA OUTPUT [SECONDS]
#
# DATA holds mvtec_ad/toothbrush; OUTPUT gets a file a part. Each part has its own time
# limit, and what it had printed by then is kept; SECONDS (530, at least 420) is that of
# all. What is not timed runs side by side. On a processor, tiny settings try the script
# itself: DEVICE=cpu sh benchmarks/gpu.sh DATA OUTPUT. After Ctrl-C, what runs in the
# background goes on to its limit.
data=${1:?DATA} output=${2:?OUTPUT} seconds=${3:-530}
device=${DEVICE:-cuda} here=$(dirname "$0")
started=$(date +%s)
mkdir -p "$output"
[ "$seconds" -ge 420 ] || { echo "SECONDS must be at least 420" >&2; exit 2; }
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1

elapsed() {
    echo $(($(date +%s) - started))
}

part() { # NAME SECONDS COMMAND...
    name=$1 limit=$2
    shift 2
    echo "$name: from $(elapsed) s on, for at most $limit s"
    : >"$output/$name.txt"
    # appended, as a child may still write when its parent has ended
    timeout -k 5 "$limit" "$@" >>"$output/$name.txt" 2>&1
    echo "exit status $?, at $(elapsed) s" >>"$output/$name.txt"
}

show() { # NAME...
    for name in "$@"; do
        printf '\n== %s\n' "$name"
        tail -n 60 "$output/$name.txt"
    done
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
        --methods DRAEM MemAE &
    part tests 60 python -m pytest -q -p no:cacheprovider -k "four_calls and AE" \
        "$here/../tests/test_common.py" &
    wait
    speed paper 60 --sizes 32 --methods DRAEM --seconds 0.2 \
        --precisions float32 tf32 bfloat16
    budget=0.05
    params="draem.reconstructive_width=4 draem.discriminative_width=4 riad.width=4
        intra.width=16 intra.n_blocks=1 intra.n_heads=2 intra.patch_size=8
        intra.window_size=3"
    set -- --params $params --size 32
else
    part devices 110 python "$here/devices.py" --device "$device" &
    workers=
    # pytest-benchmark warns of xdist, and warnings are errors
    python -c "import xdist" 2>/dev/null && workers="-n 8 -p no:benchmark"
    # shellcheck disable=SC2086
    part tests 110 python -m pytest -v -p no:cacheprovider $workers --maxfail=20 --cuda \
        -k "not scikit_learn_checks" "$here/../tests/test_common.py" &
    wait
    speed paper 120 --paper --sizes 256 --seconds 0.5 \
        --methods DRAEM RIAD MNAD InTra --precisions float32 tf32 bfloat16
    budget=
    set -- --size 256
fi
# tests and figures of a training take about a minute, and so do the first epochs
left=$((seconds - $(elapsed)))
[ "$budget" ] || budget=$(echo "$left" | awk '{print ($1 - 130) / 60}')
for method in draem riad intra; do
    part "$method" "$left" python "$here/accuracy.py" --data "$data" \
        --sets mvtec_ad/toothbrush --methods $method --seeds 0 \
        --budget "$budget" --output "$output/$method" "$@" &
done
wait
show machine devices
printf '\n== tests: what failed, and the end\n'
grep -E "FAILED|ERROR" "$output/tests.txt"
tail -n 3 "$output/tests.txt"
show paper draem riad intra
printf '\nall in %s s\n' "$(elapsed)"
