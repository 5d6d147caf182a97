# The body of the pretraining jobs: one task per GPU, over all nodes. CONFIG names a file of pretrain/configs.
source "$SLURM_SUBMIT_DIR/slurm/job.sh"

run_step "rank%t.log" bash slurm/rank.sh python -u pretrain/pretrain.py --config "pretrain/configs/$CONFIG.yaml" \
    run.dir="$RUN_DIR" run.device="$DEVICE" ${DUALTOKEN:+"model.dualtoken=$DUALTOKEN"} \
    ${TEXT_TOKENIZER:+"model.text_tokenizer=$TEXT_TOKENIZER"} ${SHARDS:+"data.sets=[$SHARDS]"} "$@"
