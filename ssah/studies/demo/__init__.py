"""``ssah demo``: a small model aligned, scored, grouped and ablated."""
