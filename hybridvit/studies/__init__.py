"""Comparisons: grids of runs at matched cost, and the statistics over their seeds."""
