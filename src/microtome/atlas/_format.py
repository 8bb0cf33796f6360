"""What an atlas is on disk."""

KIND = "microtome atlas"

FORMAT = 1
"""Of the folder; a reader refuses another one."""

TEXT_FILE = "text.parquet"
"""The tokens of the text that was read, as words, in order."""

LABELS_FILE = "assets/data/labels.js"
"""What a user called units of the model, for the pages; an atlas of an earlier version may get it later."""
