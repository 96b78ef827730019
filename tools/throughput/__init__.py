"""Parts of `tools/bench_throughput.py`."""
