"""Studies that train one model in several ways to equal training loss."""
