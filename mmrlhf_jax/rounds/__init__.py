"""Online rounds: a policy's own answers are scored, ranked and trained on, again and again (launch/rounds.py)."""
