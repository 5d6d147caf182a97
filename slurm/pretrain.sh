# The body of the pretraining jobs: one task per GPU, over all nodes. CONFIG names a file of pretrain/configs.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/env.sh"
source slurm/restart.sh

logs="$RUN_DIR/logs/$SLURM_JOB_ID.$SLURM_RESTART_COUNT"
mkdir -p "$logs"
echo "$(date -Is) job $SLURM_JOB_ID, start $SLURM_RESTART_COUNT on $SLURM_JOB_NODELIST: $logs"

# --wait: ranks that outlive another one's end by so many seconds are killed.
code=0
srun $SRUN_ARGS --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=40 --kill-on-bad-exit=0 --output="$logs/rank%t.log" \
    bash slurm/rank.sh python -u pretrain/pretrain.py --config "pretrain/configs/$CONFIG.yaml" \
    run.dir="$RUN_DIR" run.device="$DEVICE" ${DUALTOKEN:+"model.dualtoken=$DUALTOKEN"} \
    ${TEXT_TOKENIZER:+"model.text_tokenizer=$TEXT_TOKENIZER"} ${SHARDS:+"data.sets=[$SHARDS]"} "$@" || code=$?
grep --no-filename "^error:" "$logs"/*.log || true
after_step "$code"
