"""The paper's studies: language models with memories, trained and timed (`pkm-perf study`)."""
