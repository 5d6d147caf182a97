#!/usr/bin/env bash
# From raw pairs to a model that was tried, as jobs that wait for each other:   bash slurm/pipeline.sh FOLDER
#   TOKENIZER_CONFIG (pretrain/train_tokenizer.py), TOKENIZE_CONFIG (data_pipeline/tokenize.py), PRETRAIN (7b, 3b or
#   another slurm/pretrain_*.sh) say what; TEXT_TOKENIZER what it reads text with; HELDOUT, DETECTOR, PROMPTS and others
#   of slurm/evaluate.sh what is done with it. PRETRAIN_ARGS are passed on; SBATCH_ARGS are for every sbatch. All stages
#   write to FOLDER.
set -euo pipefail
cd "$(dirname "$0")/.."
source slurm/env.sh
folder=${1:?a folder for all that the stages write}
: "${TOKENIZER_CONFIG:?}" "${TOKENIZE_CONFIG:?}" "${TEXT_TOKENIZER:?}"
: "${HELDOUT:=}" "${DETECTOR:=}" "${CORPUS:=}" "${PROMPTS:=}" "${TRY_ARGS:=}" "${SCENES_ARGS:=}" "${DRAW_ARGS:=}"
: "${PRETRAIN:=7b}" "${SBATCH_ARGS:=}"
export HELDOUT DETECTOR CORPUS PROMPTS TRY_ARGS SCENES_ARGS DRAW_ARGS
export DEVICE TEXT_TOKENIZER DUALTOKEN="$folder/tokenizer/dualtoken" SHARDS="$folder/shards"

# submit JOB-IT-WAITS-FOR SCRIPT ARGUMENTS...: a stage that can never start, since an earlier one failed, is removed.
submit() {
    local after=$1
    shift
    sbatch --parsable ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} $SBATCH_ARGS "$@"
}

tokenizer=$(RUN_DIR="$folder/tokenizer" submit "" slurm/train_tokenizer.sh --config "$TOKENIZER_CONFIG")
shards=$(submit "$tokenizer" slurm/tokenize.sh --config "$TOKENIZE_CONFIG" dualtoken="$DUALTOKEN" \
    text_tokenizer="$TEXT_TOKENIZER" output="$SHARDS")
llm=$(RUN_DIR="$folder/pretrain" submit "$shards" "slurm/pretrain_$PRETRAIN.sh" ${PRETRAIN_ARGS:-})
model=$(submit "$llm" slurm/convert.sh "$folder/pretrain" "$folder/hf")
tried=$(submit "$model" slurm/evaluate.sh "$folder/hf" "$folder/evaluation")
echo "tokenizer $tokenizer, shards $shards, pretrain $llm, convert $model, evaluate $tried"
