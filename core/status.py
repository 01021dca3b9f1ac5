"""What processes say to one another without a word: exit statuses, and the files that stop a run or have it save."""

import os

BAD_INPUT = 2  # the user can mend it; one line said what
DIVERGED = 3
DAMAGED = 4  # the checkpoint to go on from
NO_SPACE = 5  # the disk is full, or would be
NOT_UPLOADED = 6  # trained, or prepared, but not on the Hub
INTERRUPTED = os.EX_TEMPFAIL  # 75: the same command goes on
FINAL = (0, BAD_INPUT, DIVERGED, DAMAGED, NO_SPACE, NOT_UPLOADED)  # done, or what another start would meet again

STOP, SAVE = "STOP", "SAVE"  # files in output_dir: save and stop, save and go on; removed when heard
BY_STOP_FILE = "its STOP file"  # what run.json's last_stop says of the first
