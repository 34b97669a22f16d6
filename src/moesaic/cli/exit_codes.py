"""What the command line's exit codes mean: the one place."""

from __future__ import annotations

DONE, FAILED, USAGE, INTERRUPTED, NOBODY_READS = 0, 1, 2, 130, 141

EXIT_CODES = {
    DONE: "done",
    FAILED: "it failed; stderr says why in one line",
    USAGE: "wrong usage: a command, an option or a value that there is not",
    INTERRUPTED: "ended by Ctrl-C",
    NOBODY_READS: "whoever read the output went away",
}
EPILOG = "Exit codes: " + "; ".join(f"{code} {why}" for code, why in EXIT_CODES.items()) + "."
