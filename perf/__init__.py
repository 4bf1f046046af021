"""The perf harness: sweeps, plots and kernel reports (`pkm-perf`)."""
