"""Data that need no download: captioned scenes of drawings, and random inputs of the released sizes."""
