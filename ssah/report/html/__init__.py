"""The page of ``ssah report``: one HTML file with the tables and pictures of every run."""
