# Sourced by the training jobs: set-up, the step on all nodes, and what the job does with its exit codes.
set -euo pipefail
source "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}/slurm/env.sh"

logs="$RUN_DIR/logs/$SLURM_JOB_ID.$SLURM_RESTART_COUNT"
mkdir -p "$logs"
echo "$(date -Is) job $SLURM_JOB_ID, start $SLURM_RESTART_COUNT on $SLURM_JOB_NODELIST: $logs"
export MEGADUAL_EXITS="$logs" # ranks that fail leave exit.RANK.CODE here

# run_step OUTPUT COMMAND...: srun COMMAND with its output in the logs; then the job ends, or goes on in another start.
run_step() {
    local output="$logs/$1" code=0
    shift
    # --wait: tasks that outlive another one's end by so many seconds are killed. Not in the foreground, where a trap
    # would have to wait; a trap ends bash's wait, so it is begun again.
    srun $SRUN_ARGS --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=40 --kill-on-bad-exit=0 --output="$output" "$@" &
    while code=0; wait $! || code=$?; kill -0 $! 2>/dev/null; do :; done
    grep -rhsE "^([a-z_]+\.py: )?error: " "$logs" | sort -u || true
    after_step "$code"
}

# after_step CODE: end the job, or put it back into the queue under its own number.
#   75 (stopped by a signal, checkpoint written): always again
#   2 (wrong input) and 76 (a loss that can't be right): never, since it would only happen again
#   others (a rank died, hung, or its node is bad): again, MAX_RESTARTS times
# One rank's code forbids a restart, whatever the step's is: srun's may be that of a rank it killed.
after_step() {
    local code failures="$RUN_DIR/logs/$SLURM_JOB_ID.failures"
    for code in "$logs"/exit.* "$1"; do
        code=${code##*.}
        case $code in
            0) exit 0 ;;
            2 | 76) exit "$code" ;;
        esac
    done
    if [[ $code == 75 || -n $(compgen -G "$logs/exit.*.75") ]]; then
        echo "stopped by a signal; back into the queue"
    else
        echo "$(date -Is) start $SLURM_RESTART_COUNT ended with $code" >>"$failures"
        if (($(wc -l <"$failures") > MAX_RESTARTS)); then
            echo "failed $((MAX_RESTARTS + 1)) times, the last time with exit code $code; giving up"
            exit "$code"
        fi
        echo "failed with exit code $code; restart $(wc -l <"$failures") of $MAX_RESTARTS"
    fi
    scontrol requeue "$SLURM_JOB_ID"
    sleep infinity # until Slurm ends this shell
}
