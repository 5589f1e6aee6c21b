"""The pieces of ``compare.py``: what is computed, by whom, how it is timed and how the result is told."""
