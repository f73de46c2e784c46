"""The little world that the built-in model draws: scenes of coloured shapes, their captions, reading a picture."""
