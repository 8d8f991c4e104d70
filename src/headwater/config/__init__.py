"""Recipes: frozen, strict settings, read from YAML."""
