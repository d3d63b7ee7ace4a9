"""`python -m durable_sa.cli`, the same as `durable`."""

from . import main

if __name__ == "__main__":
    main()
