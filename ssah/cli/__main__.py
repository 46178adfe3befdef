"""``python -m ssah.cli``: the command line where no script is on the path."""

from ssah.cli import app

app()
