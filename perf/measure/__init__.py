"""Timing, memory, workloads, baselines and the roofline."""
