"""How the process ends, for scripts that decide what to do next. Anything else is 128 + n: signal n."""

DONE = 0
CRASH = 1  # with a traceback
BAD_INPUT = 2  # nothing was trained; the same command fails again
NONFINITE = 3  # NaN or infinite loss or gradient
DOES_NOT_FIT = 4  # the planner's verdict
NOT_SAVED = 5  # training went on, but its last checkpoint or its results could not be written
LOST_RANK = 6  # a process is dead, hangs or cannot be reached; start again to go on from the last checkpoint
DATA_LOST = 7  # a file of the data vanished or became unreadable; the last step is saved
PREEMPTED = 75  # SIGTERM or SIGUSR1: the step was finished and saved, start again to go on (sysexits.h: EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C, saved likewise
