#!/usr/bin/env bash
# Pre-tokenization on the nodes of one allocation:
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=128 slurm/tokenize.sh --config CONFIG.yaml workers.gpus=0.25 ...
# Inputs, output and tokenizers must be seen from all nodes. What is committed stays: submitted again, or requeued, the
# job goes on from there.
#SBATCH --job-name=tokenize
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/env.sh"

source slurm/ray.sh
on_ray tokenize python -u data_pipeline/tokenize.py "$@"
