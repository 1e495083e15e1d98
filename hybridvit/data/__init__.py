"""Data sets, augmentation and the stateless order in which images are seen."""
