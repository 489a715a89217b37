"""The jobs: notebooks run strictly, side by side, and in batches. They build on the laboratory and need a clone."""
