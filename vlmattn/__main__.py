"""`python -m vlmattn` is the command `vlmattn`."""

from vlmattn.cli import app

if __name__ == "__main__":
    app(prog_name="vlmattn")
