"""The whole way on a laptop, at a tiny size: `python -m megadual.demo`."""
