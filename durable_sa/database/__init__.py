"""Engine only: connections to the database, statements executed on them, and wake-up hints. Not for applications."""
