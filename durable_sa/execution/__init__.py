"""Engine only: one run of a task, and what it reads and writes. Not for applications."""
