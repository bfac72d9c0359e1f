"""Runs of published protocols: configuration in, tables and figures out."""

import warnings

# Of Avalanche's GEM, which is not used here, each time that Avalanche is imported.
warnings.filterwarnings("ignore", "no QP solver found")
