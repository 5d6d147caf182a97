"""How well a DualToken reconstructs and understands held-out images."""
