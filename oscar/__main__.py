"""`python -m oscar`: the command line."""

from oscar.cli.main import run

if __name__ == "__main__":
    run()
