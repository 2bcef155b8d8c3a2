"""Learn and teach the method: a tutorial with pictures, and exercises with a hand-out."""
