"""Tables and figures of ``docs/evidence.md``, made of the results alone."""
