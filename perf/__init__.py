"""The perf harness: sweeps, studies, plots and kernel reports (`pkm-perf`)."""
