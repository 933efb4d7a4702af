"""What a recipe would need on chips that are not here, and how long its step should take."""
