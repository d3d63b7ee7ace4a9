"""Engine only: schedules as they are stored, and the spawns that they fire. Not for applications."""
