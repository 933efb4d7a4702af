"""The report of runs: one HTML file that needs neither network nor script. See launch/report.py."""
