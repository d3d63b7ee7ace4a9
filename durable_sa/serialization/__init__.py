"""Engine only: values to JSON and back, faithfully. Not for applications."""
