"""Engine only: values as JSON and back without loss. Not for applications."""
