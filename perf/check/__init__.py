"""Proof of the library on the machine at hand (`pkm-perf check`); needs torch and triton alone.

Modules of checks (`lookups`, `reads`, `steps`, `machinery`, `speed`) yield named checks; `run` does
them one by one, `page` shows what came out, here or anywhere.
"""
