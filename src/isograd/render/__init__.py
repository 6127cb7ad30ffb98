"""How a diagnosis looks: text, HTML, JSON, SARIF and GitHub annotations, all from the same `Diagnosis`."""
