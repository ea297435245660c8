"""``python -m fastcircuit``."""

from fastcircuit.cli import main

if __name__ == "__main__":
    main()
