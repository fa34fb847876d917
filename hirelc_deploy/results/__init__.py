"""What a person reads: report, comparison, staircase."""
