"""Each claim of the field as a case that runs: the acceptance suite."""
