"""What launch/study.py counts with: intervals over seeds, steps of equal cost, and the table it ends in."""
