"""Figures, measured side by side in one run: `make bench`. Never a test: machines are noisy, ratios less so."""
