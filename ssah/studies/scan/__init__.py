"""``ssah scan``: which units, how many of them, and by which way of grouping."""
