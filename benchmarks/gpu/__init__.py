"""What `benchmarks/gpu_report.sh` runs on a GPU besides the tests and `benchmarks.report`."""
