"""Who decides: strategies that propose plans within a budget and learn from measured outcomes."""
