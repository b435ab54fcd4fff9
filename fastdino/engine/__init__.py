"""The loop around a method: step, update, schedules, processes, checkpoints, logs."""
