"""Pairs of models: a healthy twin, and the same model with one planted gradient fault. See README.md."""
