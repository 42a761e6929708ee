"""Real images made editable: inversions, fits, and paths that are held."""
