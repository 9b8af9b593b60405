"""Where a job can run: one file per backend, the same small protocol in each."""
