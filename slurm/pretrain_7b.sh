#!/usr/bin/env bash
# Pretrain the 7B model:   sbatch slurm/pretrain_7b.sh key=value ...
# Nodes are sbatch's (--nodes=16); slurm/env.sh has what a site sets.
#SBATCH --job-name=pretrain-7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
CONFIG=${CONFIG:-7b}
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/pretrain.sh"
