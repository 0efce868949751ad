"""`python -m minem` is the same as `minem`."""

from minem.cli import main

if __name__ == "__main__":
    main()
