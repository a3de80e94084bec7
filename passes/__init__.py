"""Passes over captured graphs and joint graphs; each file is one pass, named after it."""
