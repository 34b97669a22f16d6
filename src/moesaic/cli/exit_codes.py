"""The only definition of the command line's exit codes and their meanings."""

from __future__ import annotations

DONE, FAILED, USAGE, INTERRUPTED, NOBODY_READS = 0, 1, 2, 130, 141

EXIT_CODES = {
    DONE: "done",
    FAILED: "failed; stderr says why in one line",
    USAGE: "wrong usage: an unknown command, option or value",
    INTERRUPTED: "ended by Ctrl-C",
    NOBODY_READS: "the reader of the output closed it",
}
EPILOG = "Exit codes: " + "; ".join(f"{code} {why}" for code, why in EXIT_CODES.items()) + "."
