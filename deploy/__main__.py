"""``python -m deploy`` is the `gdpo` command."""

from deploy.cli import run

if __name__ == "__main__":
    run()
