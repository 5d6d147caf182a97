#!/usr/bin/env bash
# What a checkpoint or an exported model is worth:   sbatch slurm/evaluate.sh RUN_DIR-OR-MODEL OUTPUT
#   HELDOUT (tars) tries it on pairs, DETECTOR (and CORPUS) scores it on scenes, PROMPTS, a folder with the prompts of
#   benchmarks under the benchmarks' names, draws them on the GPUs of all nodes. What is set is done, then OUTPUT gets one
#   report of all scores below it. TRY_ARGS, SCENES_ARGS and DRAW_ARGS are passed on. Submitted again, drawing goes on.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/env.sh"
model=${1:?RUN_DIR, one of its checkpoints, or an exported model} output=${2:?folder to write}
: "${HELDOUT:=}" "${DETECTOR:=}" "${CORPUS:=}" "${PROMPTS:=}" "${TRY_ARGS:=}" "${SCENES_ARGS:=}" "${DRAW_ARGS:=}"

mkdir -p "$output"
on_one() { srun $SRUN_ARGS --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" python "$@"; }

if [[ ! -f $model/config.json ]]; then
    on_one checkpoints_tools/convert_to_hf.py --checkpoint "$model" --output "$output/hf"
    model=$output/hf
fi
if [[ -n $HELDOUT ]]; then
    on_one checkpoints_tools/try_export.py --model "$model" --data "$HELDOUT" --output "$output/use" $TRY_ARGS
fi
if [[ -n $DETECTOR ]]; then
    on_one -m megadual.evaluate scenes --model "$model" --detector "$DETECTOR" ${CORPUS:+--corpus "$CORPUS"} \
        --output "$output/scenes" --device "$DEVICE" $SCENES_ARGS
fi
if [[ -n $PROMPTS ]]; then
    source slurm/ray.sh
    for prompts in "$PROMPTS"/*; do
        benchmark=$(basename "$prompts")
        benchmark=${benchmark%%.*}
        on_ray "evaluate-$benchmark" python -u -m megadual.evaluate draw --benchmark "$benchmark" --prompts "$prompts" \
            --model "$model" --output "$output/$benchmark" $DRAW_ARGS
    done
fi
card=()
[[ ! -w $model/README.md ]] || card=(--model "$model")
on_one -m megadual.evaluate report "$output" "${card[@]}"
