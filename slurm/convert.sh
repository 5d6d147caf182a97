#!/usr/bin/env bash
# Export a checkpoint to a Hugging Face folder, and prove it:   sbatch slurm/convert.sh RUN_DIR OUTPUT
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/env.sh"

checkpoint=${1:?RUN_DIR, or one of its checkpoints} output=${2:?folder to write}
srun $SRUN_ARGS bash -euc 'python checkpoints_tools/convert_to_hf.py --checkpoint "$0" --output "$1"
    python checkpoints_tools/verify.py --checkpoint "$0" --model "$1"' "$checkpoint" "$output"
