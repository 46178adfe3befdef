"""``ssah evaluate``: attack success with its controls, utility and tasks."""
