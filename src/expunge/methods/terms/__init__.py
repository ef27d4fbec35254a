"""Loss terms: functions of per-target quantities."""
