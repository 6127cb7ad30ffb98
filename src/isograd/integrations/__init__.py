"""isograd inside other people's training loops: thin callbacks over the monitor, and attaching from outside."""
