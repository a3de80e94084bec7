"""``lbi-compile bench``: paired measurements against named baselines, each behind a check of what it computes."""
