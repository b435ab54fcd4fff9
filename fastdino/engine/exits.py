"""Exit codes of the training command: the one list of them. A run that a signal stopped ends with 128 + its
number (143 SIGTERM, 130 SIGINT, 138 SIGUSR1), and only when its checkpoint is on the disk."""

DONE = 0  # trained to the end
NOT_FINITE = 1  # too many bad steps in a row, or weights that are not finite: starting again changes nothing
USAGE = 2  # a flag, the data or a checkpoint to continue from does not fit; nothing was begun
DATA = 66  # EX_NOINPUT: too many images cannot be read any more; the same command continues
UNEQUAL = 70  # EX_SOFTWARE: a step computed twice gave different numbers: this machine is not to be trusted
OUTPUT = 73  # EX_CANTCREAT: the output directory cannot be written, or another run holds it
DISK = 74  # EX_IOERR: no checkpoint or log could be written, after retries; the same command continues
HUNG = 75  # EX_TEMPFAIL: this process or another one hung, or another one failed; the same command continues
