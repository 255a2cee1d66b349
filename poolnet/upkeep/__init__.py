"""Keep a tracking server and local state in order."""

KINDS = ("versions", "failed", "superseded", "records", "caches")  # what `clean` deletes
