"""The autograd graph of a loss: what ran forward, its backbone, and one backward that does not underflow."""
