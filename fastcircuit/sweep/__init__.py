"""Sweeps: methods x sizes x seeds on one task, with tables and plots."""
