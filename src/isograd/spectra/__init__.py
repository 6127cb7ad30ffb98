"""Singular values of a Jacobian that is only there as a product with vectors."""
