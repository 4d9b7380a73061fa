"""One module a question: ``stages(config)`` deals its units, ``measure(lab, unit)`` does one."""
