"""What a measurement costs, side by side with a plain step and with what people use today."""
