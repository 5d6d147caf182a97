#!/usr/bin/env bash
# Train a DualToken:   sbatch slurm/train_tokenizer.sh --config CONFIG.yaml key=value ...
# Requeued at its time limit and on preemption, after a checkpoint, and after failures; it goes on from its last one.
#SBATCH --job-name=train-tokenizer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/job.sh"
trap 'touch "$MEGADUAL_STOP"' USR1 # near the time limit, or preempted; torchrun would hand no such signal on

# One task a node; torchrun starts that node's ranks.
ranks=${SLURM_GPUS_ON_NODE:-}
[[ $DEVICE == cuda ]] || { ranks=${RANKS_PER_NODE:-1}; export CUDA_VISIBLE_DEVICES=; }
run_step "node%n.log" \
    torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks" --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d \
    --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --log-dir="$logs" --redirects=3 --tee=0:3 \
    pretrain/train_tokenizer.py "$@"
