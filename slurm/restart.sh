# Sourced by the training jobs: what a job does with its step's exit code.

# after_step CODE: end the job, or put it back into the queue under its own number.
#   75 (stopped by a signal, checkpoint written): always again
#   2 (wrong input) and 76 (a loss that can't be right): never, since it would only happen again
#   others (a rank died, hung, or its node is bad): again, MAX_RESTARTS times
after_step() {
    local code=$1 failures="$RUN_DIR/logs/$SLURM_JOB_ID.failures"
    case $code in
        0) exit 0 ;;
        75) echo "stopped by a signal; back into the queue" ;;
        2 | 76) exit "$code" ;;
        *)
            echo "$(date -Is) start $SLURM_RESTART_COUNT ended with $code" >>"$failures"
            if (($(wc -l <"$failures") > MAX_RESTARTS)); then
                echo "failed $((MAX_RESTARTS + 1)) times, the last time with exit code $code; giving up"
                exit "$code"
            fi
            echo "failed with exit code $code; restart $(wc -l <"$failures") of $MAX_RESTARTS"
            ;;
    esac
    scontrol requeue "$SLURM_JOB_ID"
    sleep infinity # until Slurm ends this shell
}
