#!/usr/bin/env bash
# Use an exported model on held-out pairs:   sbatch slurm/evaluate.sh MODEL 'CORPUS/heldout-*.tar' OUTPUT
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/env.sh"

srun $SRUN_ARGS python checkpoints_tools/try_export.py --model "${1:?exported model}" --data "${2:?glob of tars}" \
    --output "${3:?folder to write}" "${@:4}"
