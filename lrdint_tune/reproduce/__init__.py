"""The experiments behind docs/results.md: materials, presets, runs with their controls, and what is read off them.

recipes/reproduce/ holds the commands. Nothing else of the package depends on this.
"""
