#!/usr/bin/env bash
# Train a DualToken:   sbatch slurm/train_tokenizer.sh --config CONFIG.yaml key=value ...
# Requeued at its time limit and on preemption, after a checkpoint, and after failures; it goes on from its last one.
#SBATCH --job-name=train-tokenizer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/job.sh"

run_step "rank%t.log" bash slurm/rank.sh python -u pretrain/train_tokenizer.py run.dir="$RUN_DIR" \
    run.device="$DEVICE" "$@"
