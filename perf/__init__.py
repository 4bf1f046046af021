"""The perf harness: sweeps, studies, plots and kernel reports (`pkm-perf`).

Its folders, each of which imports from those below it alone:

    sweep       presets, predictions, running a grid, the command
    op          one op at a time, beside another checkout
    check       the proof on a machine; needs torch and triton alone
    report      tables, pictures, comparisons, the paper's figures
    measure     timing, memory, workloads, baselines, roofline
    records     points, rows, files, environment

`studies` (the paper's, on trained models) stands beside `sweep`, `compiled` (what the compiler
makes of the kernels) beside `measure`: no other folder imports them.
"""
