"""What a training needs around its steps, whichever it is: lock, watchdog, node checks, signals, record, logs."""
