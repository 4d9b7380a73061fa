"""Experiments: do the claims of the papers hold here? ``python -m experiments --help``.

A configuration (``configs/NAME.toml``) names a question (``questions/``) and what it is asked of:
data, networks, seeds. The question deals the work into units; :mod:`experiments.runner` does them,
one file each, and collects them in ``results/<machine>/NAME.json``, from which
:mod:`experiments.report` makes the tables and figures of ``docs/evidence.md``.
"""
