"""One op at a time, on named shapes or one's own, beside another checkout: `pkm-perf op`."""
