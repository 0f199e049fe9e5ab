NEIGHBOURS = 5
"""k of precision, recall, density and coverage."""
