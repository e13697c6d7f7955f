"""`python -m pipeline.cli` is `istanas`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
