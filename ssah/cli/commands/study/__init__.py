"""Train a model in several ways, and measure every result alike."""

ORDER = 120
