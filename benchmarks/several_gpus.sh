#!/usr/bin/env bash
# What is to be measured on two or four GPUs of one host, the most wanted first:
#     bash benchmarks/several_gpus.sh OUT [EXPORTED_MODEL PROMPTS]
# First whether it is right, all at once on tiny models: layouts and resuming through NCCL, and with a model and
# GenEval's prompts, pictures drawn by one worker and by one a GPU. Then how fast it is, one after the other with nothing
# beside. OUT/done says what has ended and how, so it can be stopped at any time. To be run from a checkout that
# nothing changes meanwhile, with python3 that has everything.
set -u
out=$(realpath -m "$1"); model=${2:-}; prompts=${3:-}
cd "$(dirname "$0")/.."
mkdir -p "$out/runs"
export PYTHONPATH=$PWD:${PYTHONPATH:-} OMP_NUM_THREADS=4
gpus=$(nvidia-smi -L | wc -l)
first=0,1; second=0,1; [ "$gpus" -ge 4 ] && second=2,3

ended() {  # NAME GPUS COMMAND...
    local name=$1 on=$2 begun=$SECONDS
    shift 2
    CUDA_VISIBLE_DEVICES=$on "$@" > "$out/$name.log" 2>&1
    echo "$name: exit $?, $((SECONDS - begun)) s" >> "$out/done"
}
layouts() { ended "layouts-$1" "$2" python3 benchmarks/layouts.py --device cuda --output "$out/layouts-$1.json" "${@:3}"; }
scaling() {  # NAME GPUS LAYOUT...
    local name=$1 on=$2
    shift 2
    ended "$name" "$on" python3 benchmarks/scaling.py --gpu H100 --gpus "$gpus" --steps 20 --micro-batches $((32 / gpus)) \
        --keep "$out/runs/$name" --output "$out/$name.json" --inputs "$out/inputs" --limit 240 --only "$@"
}
checkpoints() { ended "$1" "$2" python3 benchmarks/checkpoints.py --folder "$out/runs" --inputs "$out/inputs" --only "$3"; }

ended inputs 0 python3 -m megadual.synthetic.inputs --output "$out/inputs"
layouts pairs $first --only TP2 TP2+SP PP2 PP2xVPP2 DP2 CP2 &
layouts ahead $second --only "PP2, ahead" &  # in processes of its own: kernels are loaded while stages wait
layouts deepspeed $second --only "DeepSpeed ZeRO-1 DP2" "DeepSpeed ZeRO-2 DP2" "DeepSpeed ZeRO-3 DP2" "DeepSpeed PP2" &
if [ "$gpus" -ge 4 ]; then
    layouts four 0,1,2,3 --only TP4 PP4 "PP4, heads alone" DP4 TP2xPP2+SP "TP2xPP2+SP, ahead" CP4 TP2xCP2+SP &
fi
on=$first
for pair in one-one TP2+SP-PP2 PP2xVPP2-DP2 "DP2-DeepSpeed ZeRO-3 DP2" "DeepSpeed ZeRO-3 DP2-TP2" "DeepSpeed PP2-CP2" \
    "DeepSpeed ZeRO-1 DP2-DeepSpeed ZeRO-1 DP2"; do
    ended "resume ${pair// /_}" $on python3 -m pytest --noconftest -q -p no:cacheprovider "tests/gpu/test_resume.py::test_resume[$pair]" &
    [ $on = $first ] && on=$second || on=$first
done
if [ -n "$model" ]; then
    for workers in 1 "$gpus"; do
        ended "draw-$workers" "$(seq -s, 0 $((gpus - 1)))" python3 -m megadual.evaluate draw --benchmark geneval --prompts "$prompts" \
            --model "$model" --output "$out/drawn-$workers" --batch 16 --address local --workers "$workers"
    done
    ended draw-equal 0 diff -rq -x record.json "$out/drawn-1" "$out/drawn-$gpus"
fi &
wait

scaling one 0 "one GPU" &
[ "$gpus" -ge 4 ] && checkpoints save-one 1 "one GPU" &
[ "$gpus" -ge 4 ] && scaling b $second "TP2+SP" "ZeRO-1 DP2" "TP2+SP, two rows at a time" &
wait
if [ "$gpus" -ge 4 ]; then
    scaling c 0,1,2,3 "DP4"
    scaling d 0,1,2,3 "7B TP2+SP PP2, ahead, two rows at a time"
    scaling a $first "PP2, ahead" "3B DP2" "PP2" &
    scaling e $second "ZeRO-3 DP2, no bucket, weights kept" "CP2, rows of 32,768" "DP2, gradients in bf16" &
    wait
    checkpoints save-7b 0,1,2,3 "7B TP2+SP PP2"
    for layout in "7B TP2+SP PP2, ahead, two rows at a time, FP8" "PP2 DP2, ahead" "7B TP2+SP PP2" "TP2+SP DP2" "DP4, gradients in bf16" "PP2xVPP2 DP2" "7B TP4+SP"; do
        scaling "f ${layout//[ ,]/_}" 0,1,2,3 "$layout"
    done
else
    for layout in "TP2+SP" "TP2+SP, two rows at a time" "ZeRO-1 DP2" "PP2, ahead" "ZeRO-3 DP2, no bucket, weights kept" "CP2, rows of 32,768" "3B DP2" \
        "DP2, gradients in bf16" "PP2"; do
        scaling "f ${layout//[ ,]/_}" 0,1 "$layout"
    done
    checkpoints save-one 0 "one GPU"
fi
echo "all done" >> "$out/done"
