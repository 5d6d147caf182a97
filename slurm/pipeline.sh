#!/usr/bin/env bash
# From raw pairs to a model that was tried, as jobs that wait for each other:   bash slurm/pipeline.sh FOLDER
#   TOKENIZER_CONFIG (pretrain/train_tokenizer.py), TOKENIZE_CONFIG (data_pipeline/tokenize.py), PRETRAIN (7b, 3b or
#   another slurm/pretrain_*.sh) and HELDOUT (tars to try it on) say what; TEXT_TOKENIZER what it reads text with.
#   PRETRAIN_ARGS and EVALUATE_ARGS are passed on; SBATCH_ARGS are for every sbatch. All stages write to FOLDER.
set -euo pipefail
cd "$(dirname "$0")/.."
source slurm/env.sh
folder=${1:?a folder for all that the stages write}
: "${TOKENIZER_CONFIG:?}" "${TOKENIZE_CONFIG:?}" "${TEXT_TOKENIZER:?}" "${HELDOUT:?}"
: "${PRETRAIN:=7b}" "${SBATCH_ARGS:=}"
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
tried=$(submit "$model" slurm/evaluate.sh "$folder/hf" "$HELDOUT" "$folder/use" ${EVALUATE_ARGS:-})
echo "tokenizer $tokenizer, shards $shards, pretrain $llm, convert $model, evaluate $tried"
