"""Training: one loop for every objective. `train.py` is the file to read top to bottom."""
