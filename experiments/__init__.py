"""Runs of published protocols: configuration in, tables and figures out."""
