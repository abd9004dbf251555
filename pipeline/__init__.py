"""The two stages: a frozen encoder fills a bank once, late-fusion heads are trained on it."""
